//! The deterministic byte stream of the micro guest, and its checksum: the same code on both sides of the wire.
//!
//! Words are 64 bits, little-endian. Word `n` of seed `s` is the `n`-th output of xorshift64 (Marsaglia 2003, shifts 13, 7,
//! 17) started from `mix(s)`. The checksum folds each word `w` into `h` by `h = (rotl(h, 5) ^ w) * 0x9E3779B97F4A7C15`,
//! from `h = 0`. Both cost a handful of instructions a word, because the guest often runs under emulation.

/// 2^64 divided by the golden ratio, made odd: the multiplier of the checksum and of the seed's mixing.
pub const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// Spreads a seed over 64 bits (the finaliser of SplitMix64); never zero, which xorshift could not leave.
pub fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(GOLDEN);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (z ^ (z >> 31)).max(1)
}

/// The words of one seed, without end.
#[derive(Clone, Debug)]
pub struct Words {
    state: u64,
}

impl Words {
    /// Starts at word 0 of `seed`.
    pub fn new(seed: u64) -> Self {
        Words { state: mix(seed) }
    }

    /// The next word.
    #[inline]
    pub fn next_word(&mut self) -> u64 {
        let mut x = self.state;
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.state = x;
        x
    }

    /// Fills `bytes`, whose length is a multiple of 8, with the next words.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_exact_mut(8) {
            chunk.copy_from_slice(&self.next_word().to_le_bytes());
        }
    }
}

/// The running checksum of a stream; takes bytes in pieces of any length.
#[derive(Clone, Debug, Default)]
pub struct Checksum {
    hash: u64,
    partial: [u8; 8],
    held: usize,
}

impl Checksum {
    /// Folds one whole word in. Only right while the bytes so far are a multiple of 8.
    #[inline]
    fn word(&mut self, word: u64) {
        self.hash = (self.hash.rotate_left(5) ^ word).wrapping_mul(GOLDEN);
    }

    /// Folds `bytes` in.
    pub fn update(&mut self, mut bytes: &[u8]) {
        while self.held > 0 && !bytes.is_empty() {
            self.partial[self.held] = bytes[0];
            self.held = (self.held + 1) % 8;
            bytes = &bytes[1..];
            if self.held == 0 {
                self.word(u64::from_le_bytes(self.partial));
            }
        }
        let mut words = bytes.chunks_exact(8);
        for chunk in &mut words {
            let mut word = [0; 8];
            word.copy_from_slice(chunk);
            self.word(u64::from_le_bytes(word));
        }
        let rest = words.remainder();
        self.partial[self.held..self.held + rest.len()].copy_from_slice(rest);
        self.held += rest.len();
    }

    /// The checksum of the whole words seen so far; bytes after the last whole word do not count.
    pub fn value(&self) -> u64 {
        self.hash
    }
}
