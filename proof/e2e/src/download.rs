//! One long download, every byte of it checked: against the stream that its
//! seed defines, and against the checksum that the guest sends at its end.

use crate::http::get_stream;
use crate::probe::enter_netns;
use anyhow::{Context, Result, bail};
use std::io::Read;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Longest silence on the connection before it counts as broken.
const SILENCE: Duration = Duration::from_secs(20);
const CHUNK: usize = 64 << 10;
/// The multiplier of the guest's stream and checksum (`host/image/micro/stream.rs`).
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// A running download. It is read slowly, so that it lasts, until
/// [`Download::finish`] asks for the rest.
#[derive(Debug)]
pub struct Download {
    hurry: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
    bytes: u64,
    thread: Option<JoinHandle<Result<u64>>>,
}

impl Download {
    /// Starts `GET /download` of `mib` MiB of `seed`, read at `rate_mib_s`, from
    /// the network namespace at `netns`.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(netns: &Path, ip: Ipv4Addr, mib: u64, seed: u64, rate_mib_s: u64) -> Result<Download> {
        let hurry = Arc::new(AtomicBool::new(false));
        let received = Arc::new(AtomicU64::new(0));
        let bytes = mib << 20;
        let (netns, pace) = (
            netns.to_owned(),
            Pace {
                rate: rate_mib_s << 20,
                hurry: hurry.clone(),
                received: received.clone(),
            },
        );
        let body = move || {
            enter_netns(&netns)?;
            let target = format!("/download?mib={mib}&seed={seed}");
            let (stream, length) = get_stream(ip, &target, SILENCE)?;
            if length != bytes {
                bail!("the download announces {length} bytes, not {bytes}");
            }
            check(stream, length, seed, &pace)
        };
        let thread = thread::Builder::new()
            .name("download".into())
            .spawn(body)
            .context("cannot start the download")?;
        Ok(Download {
            hurry,
            received,
            bytes,
            thread: Some(thread),
        })
    }

    /// Bytes received so far, and of how many.
    pub fn progress(&self) -> (u64, u64) {
        (self.received.load(Ordering::Relaxed), self.bytes)
    }

    /// Reads the rest at full speed; returns the number of bytes, all right.
    ///
    /// # Errors
    /// When the connection broke or a byte was wrong.
    pub fn finish(mut self) -> Result<u64> {
        self.hurry.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(done)) => done.context("the long download"),
            _ => bail!("the download's thread panicked"),
        }
    }
}

struct Pace {
    rate: u64,
    hurry: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
}

impl Pace {
    /// Holds the reader back so that TCP holds the guest back.
    fn keep(&self, started: Instant, received: u64) {
        self.received.store(received, Ordering::Relaxed);
        let due = Duration::from_secs_f64(received as f64 / self.rate.max(1) as f64);
        while !self.hurry.load(Ordering::Relaxed) {
            let left = due.saturating_sub(started.elapsed());
            if left.is_zero() {
                return;
            }
            thread::sleep(left.min(Duration::from_millis(20)));
        }
    }
}

/// Reads `length` bytes and compares each word.
fn check(mut stream: impl Read, length: u64, seed: u64, pace: &Pace) -> Result<u64> {
    let started = Instant::now();
    let (mut state, mut hash) = (mix(seed), 0_u64);
    let mut chunk = vec![0_u8; CHUNK];
    let mut received = 0;
    while received < length {
        let size = (length - received).min(CHUNK as u64) as usize;
        stream
            .read_exact(&mut chunk[..size])
            .with_context(|| format!("broke near byte {received} of {length}"))?;
        for (index, bytes) in chunk[..size].chunks_exact(8).enumerate() {
            let word = u64::from_le_bytes(bytes.try_into().context("eight bytes")?);
            let at = received + 8 * index as u64;
            if at + 8 == length {
                if word != hash {
                    bail!("the checksum is wrong after {length} bytes");
                }
                break;
            }
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            if word != state {
                bail!("byte {at} of {length} is wrong");
            }
            hash = (hash.rotate_left(5) ^ word).wrapping_mul(GOLDEN);
        }
        received += size as u64;
        pace.keep(started, received);
    }
    Ok(received)
}

/// The finaliser of SplitMix64, never zero.
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(GOLDEN);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (z ^ (z >> 31)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace() -> Pace {
        Pace {
            rate: 1,
            hurry: Arc::new(AtomicBool::new(true)),
            received: Arc::default(),
        }
    }

    /// What the guest would send.
    fn stream(seed: u64, length: usize) -> Vec<u8> {
        let (mut state, mut hash, mut bytes) = (mix(seed), 0_u64, Vec::new());
        while bytes.len() < length - 8 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend(state.to_le_bytes());
            hash = (hash.rotate_left(5) ^ state).wrapping_mul(GOLDEN);
        }
        bytes.extend(hash.to_le_bytes());
        bytes
    }

    #[test]
    fn a_whole_stream_is_right_and_any_flipped_bit_is_not() {
        let length = 200 << 10;
        let good = stream(7, length);
        assert_eq!(check(&good[..], length as u64, 7, &pace()).unwrap(), length as u64);
        for at in [0, CHUNK, length - 16, length - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(check(&bad[..], length as u64, 7, &pace()).is_err(), "byte {at}");
        }
        assert!(check(&good[..], length as u64, 8, &pace()).is_err(), "another seed");
        assert!(check(&good[..1000], length as u64, 7, &pace()).is_err(), "cut short");
    }
}
