//! Writes a known stream to /dev/vda, syncs it, and reads it back past the page cache.
//!
//! On disk: one 4 KiB header (magic, seed, data bytes: three little-endian words) and then the data. The header is written
//! and synced last, so a torn write is "nothing written", not a mismatch; the check works after a reboot too.

use crate::stream::{Checksum, Words};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;

const DEVICE: &str = "/dev/vda";
const MAGIC: u64 = u64::from_le_bytes(*b"godwitv1");
const BLOCK: usize = 4096;
const CHUNK: usize = 256 << 10;
/// `O_DIRECT` on x86-64 Linux (uapi/asm-generic/fcntl.h).
const O_DIRECT: i32 = 0o40000;

/// What has been done to the disk since the program started.
#[derive(Default)]
pub(crate) struct Disk {
    writes: u64,
    checks: u64,
    failed_checks: u64,
}

/// What a check found.
struct Check {
    seed: u64,
    bytes: u64,
    checksum: u64,
    first_bad_byte: Option<u64>,
}

impl Disk {
    /// The disk as JSON.
    pub(crate) fn status(&self) -> String {
        let bytes = size_bytes();
        let (writes, checks, failed) = (self.writes, self.checks, self.failed_checks);
        format!(
            "{{\"present\":{},\"bytes\":{},\"writes\":{writes},\"checks\":{checks},\"failed_checks\":{failed}}}",
            bytes.is_some(),
            bytes.unwrap_or(0),
        )
    }

    /// Writes `mib` MiB of `seed`'s stream and syncs; answers JSON with the checksum.
    ///
    /// # Errors
    /// What went wrong with the device, as a message.
    pub(crate) fn write(&mut self, mib: u64, seed: u64) -> Result<String, String> {
        let room = size_bytes()
            .ok_or("the guest has no disk /dev/vda")?
            .saturating_sub(BLOCK as u64)
            >> 20;
        if mib == 0 || mib > room {
            return Err(format!("mib={mib} must be from 1 to {room}, the size of the disk"));
        }
        let checksum = write_stream(mib << 20, seed).map_err(|error| format!("writing {DEVICE}: {error}"))?;
        self.writes += 1;
        Ok(format!(
            "{{\"mib\":{mib},\"seed\":{seed},\"checksum\":\"{checksum:016x}\"}}\n"
        ))
    }

    /// Reads back what the header promises; answers JSON with `ok`.
    ///
    /// # Errors
    /// When nothing was written, or the device fails, as a message.
    pub(crate) fn check(&mut self) -> Result<String, String> {
        size_bytes().ok_or("the guest has no disk /dev/vda")?;
        let check = check_stream().map_err(|error| format!("reading {DEVICE}: {error}"))?;
        let Check {
            seed,
            bytes,
            checksum,
            first_bad_byte,
        } = check.ok_or("nothing was written to the disk yet")?;
        self.checks += 1;
        self.failed_checks += u64::from(first_bad_byte.is_some());
        let bad = first_bad_byte.map_or("null".to_string(), |at| at.to_string());
        Ok(format!(
            "{{\"ok\":{},\"mib\":{},\"seed\":{seed},\"checksum\":\"{checksum:016x}\",\"first_bad_byte\":{bad}}}\n",
            first_bad_byte.is_none(),
            bytes >> 20,
        ))
    }
}

/// The size of the disk, `None` without one.
fn size_bytes() -> Option<u64> {
    let sectors = std::fs::read_to_string("/sys/block/vda/size").ok()?;
    Some(sectors.trim().parse::<u64>().ok()? * 512)
}

/// Invalidates the header, writes the data, syncs, then writes the header and syncs again.
fn write_stream(bytes: u64, seed: u64) -> io::Result<u64> {
    let mut device = OpenOptions::new().write(true).open(DEVICE)?;
    let mut header = [0; BLOCK];
    device.write_all(&header)?;
    device.sync_all()?;
    let (mut words, mut checksum) = (Words::new(seed), Checksum::default());
    let mut chunk = vec![0; CHUNK];
    for _ in 0..bytes / CHUNK as u64 {
        words.fill(&mut chunk);
        checksum.update(&chunk);
        device.write_all(&chunk)?;
    }
    device.sync_all()?;
    for (at, word) in [MAGIC, seed, bytes].into_iter().enumerate() {
        header[at * 8..at * 8 + 8].copy_from_slice(&word.to_le_bytes());
    }
    device.seek(SeekFrom::Start(0))?;
    device.write_all(&header)?;
    device.sync_all()?;
    Ok(checksum.value())
}

/// Reads the header and compares the data with its seed's stream; `None` without a header.
fn check_stream() -> io::Result<Option<Check>> {
    let mut device = OpenOptions::new().read(true).custom_flags(O_DIRECT).open(DEVICE)?;
    // O_DIRECT wants an aligned buffer: take the aligned part of a larger one.
    let mut memory = vec![0; CHUNK + BLOCK];
    let skip = memory.as_ptr().align_offset(BLOCK);
    let buffer = &mut memory[skip..skip + CHUNK];
    device.read_exact(&mut buffer[..BLOCK])?;
    let word = |at: usize| u64::from_le_bytes(buffer[at * 8..at * 8 + 8].try_into().unwrap_or_default());
    let (magic, seed, bytes) = (word(0), word(1), word(2));
    if magic != MAGIC || bytes % CHUNK as u64 != 0 {
        return Ok(None);
    }
    compare(&mut device, buffer, seed, bytes).map(Some)
}

/// Compares `bytes` bytes of the device, from where it stands, with the stream of `seed`.
fn compare(device: &mut File, buffer: &mut [u8], seed: u64, bytes: u64) -> io::Result<Check> {
    let (mut words, mut checksum, mut first_bad_byte) = (Words::new(seed), Checksum::default(), None);
    let mut expected = vec![0; CHUNK];
    for chunk in 0..bytes / CHUNK as u64 {
        device.read_exact(buffer)?;
        checksum.update(buffer);
        words.fill(&mut expected);
        if first_bad_byte.is_none() && *buffer != *expected {
            let at = buffer
                .iter()
                .zip(&expected)
                .position(|(read, wanted)| read != wanted)
                .unwrap_or(0);
            first_bad_byte = Some(chunk * CHUNK as u64 + at as u64);
        }
    }
    Ok(Check {
        seed,
        bytes,
        checksum: checksum.value(),
        first_bad_byte,
    })
}
