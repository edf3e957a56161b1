//! The agent's journal: the last saved state of each VM, in a file that only grows until it is written anew.
//!
//! ```text
//!   ┌────────┬────────┬──────────────────────────────────────┐
//!   │ length │ CRC-32 │ {"sequence":N,"boot":"…","saved":{…}} │  one record; little-endian numbers
//!   └────────┴────────┴──────────────────────────────────────┘
//! ```
//!
//! Invariants:
//! - A record is in the kernel before [`Journal::append`] returns: it survives the agent. It survives a loss of power only after
//!   its [`Journal::sync_handle`] was synced; a host that lost power runs no guest, and its boot id tells.
//! - A torn or damaged tail is cut off at the first bad record; nothing after it is read.
//! - Compaction writes a new file and renames it: there is always one whole journal.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use model::{BootId, VmId};
use serde::{Deserialize, Serialize};
use task::Saved;

/// Longest record, bytes.
const RECORD_BYTES_MAX: usize = 1 << 20;
/// The file is written anew when it is longer than this and four times what it holds.
const COMPACT_BYTES: u64 = 4 << 20;
/// VMs that are gone of which a record is kept, so that late words about them are answered; the oldest go.
const TOMBSTONES_MAX: usize = 1000;
const HEADER_BYTES: usize = 8;

/// The agent's journal.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    boot: BootId,
    sequence: u64,
    bytes: u64,
    last: BTreeMap<VmId, Kept>,
}

#[derive(Clone, Debug)]
struct Kept {
    sequence: u64,
    saved: Saved,
}

#[derive(Serialize, Deserialize)]
struct Record<S> {
    sequence: u64,
    boot: BootId,
    saved: S,
}

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file system said no.
    #[error("the journal {} cannot be used", path.display())]
    File {
        /// The journal.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another agent has it.
    #[error("the journal {} is in use by another agent; stop that one first", path.display())]
    InUse {
        /// The journal.
        path: PathBuf,
    },
    /// A newer agent wrote it.
    #[error("the journal {} was written by a newer godwit (record version {version}); run that one", path.display())]
    Newer {
        /// The journal.
        path: PathBuf,
        /// The record's version.
        version: u16,
    },
    /// A record cannot be written down.
    #[error("the state of VM {vm} cannot be written to the journal")]
    Record {
        /// The VM.
        vm: VmId,
        /// Why.
        source: serde_json::Error,
    },
}

impl Journal {
    /// Opens the journal, or begins one, and takes its lock.
    ///
    /// # Errors
    /// [`JournalError`].
    pub(crate) fn open(path: &Path, boot: BootId) -> Result<Self, JournalError> {
        let fail = |source| JournalError::File {
            path: path.to_owned(),
            source,
        };
        let mut file = File::options()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .map_err(fail)?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| JournalError::InUse { path: path.to_owned() })?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(fail)?;
        let (last, sequence, good) = Self::read(path, &bytes)?;
        if good < bytes.len() {
            tracing::warn!(path = %path.display(), lost = bytes.len() - good, "the journal's torn tail was cut off");
            file.set_len(good as u64).map_err(fail)?;
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            boot,
            sequence,
            bytes: good as u64,
            last,
        })
    }

    /// The last saved state of each VM.
    pub(crate) fn saved(&self) -> impl Iterator<Item = &Saved> {
        self.last.values().map(|kept| &kept.saved)
    }

    /// The last saved state of one VM.
    #[must_use]
    pub(crate) fn saved_of(&self, vm: VmId) -> Option<&Saved> {
        self.last.get(&vm).map(|kept| &kept.saved)
    }

    /// Writes a VM's state. It is in the kernel when this returns.
    ///
    /// # Errors
    /// [`JournalError`]; then nothing that the record announces may be done.
    pub(crate) fn append(&mut self, saved: &Saved) -> Result<(), JournalError> {
        let record = Self::encode(self.sequence + 1, self.boot, saved)?;
        if let Err(source) = self.file.write_all(&record) {
            // A part of the record must not stay in front of the next one.
            let _ = self.file.set_len(self.bytes);
            return Err(JournalError::File {
                path: self.path.clone(),
                source,
            });
        }
        self.sequence += 1;
        self.bytes += record.len() as u64;
        self.last.insert(
            saved.vm,
            Kept {
                sequence: self.sequence,
                saved: saved.clone(),
            },
        );
        self.forget_oldest();
        if self.bytes > COMPACT_BYTES && self.bytes > 4 * self.held_bytes() {
            self.compact()?;
        }
        Ok(())
    }

    /// A handle by which the file can be brought to disk without holding the journal.
    ///
    /// # Errors
    /// [`JournalError::File`].
    pub(crate) fn sync_handle(&self) -> Result<File, JournalError> {
        self.file.try_clone().map_err(|source| JournalError::File {
            path: self.path.clone(),
            source,
        })
    }

    fn held_bytes(&self) -> u64 {
        // A record is some kilobytes; an estimate will do for deciding when to compact.
        self.last.len() as u64 * 4096
    }

    fn forget_oldest(&mut self) {
        if self.last.len() <= TOMBSTONES_MAX {
            return;
        }
        let tombstone = |kept: &Kept| kept.saved.role == task::Role::None && kept.saved.pending.is_none();
        let mut tombstones: Vec<_> = self
            .last
            .iter()
            .filter(|(_, kept)| tombstone(kept))
            .map(|(&vm, kept)| (kept.sequence, vm))
            .collect();
        if tombstones.len() > TOMBSTONES_MAX {
            tombstones.sort_unstable();
            for (_, vm) in &tombstones[..tombstones.len() - TOMBSTONES_MAX] {
                self.last.remove(vm);
            }
        }
    }

    fn compact(&mut self) -> Result<(), JournalError> {
        let fail = |source| JournalError::File {
            path: self.path.clone(),
            source,
        };
        let draft = self.path.with_extension("new");
        let mut records = Vec::new();
        for kept in self.last.values() {
            records.extend(Self::encode(kept.sequence, self.boot, &kept.saved)?);
        }
        let _ = fs::remove_file(&draft);
        let mut file = File::options()
            .read(true)
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(&draft)
            .map_err(fail)?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|e| fail(e.into()))?;
        file.write_all(&records).and_then(|()| file.sync_data()).map_err(fail)?;
        fs::rename(&draft, &self.path).map_err(fail)?;
        self.file = file;
        self.bytes = records.len() as u64;
        Ok(())
    }

    fn encode(sequence: u64, boot: BootId, saved: &Saved) -> Result<Vec<u8>, JournalError> {
        let mut record = vec![0; HEADER_BYTES];
        serde_json::to_writer(&mut record, &Record { sequence, boot, saved })
            .map_err(|source| JournalError::Record { vm: saved.vm, source })?;
        let body = &record[HEADER_BYTES..];
        let header = ((body.len() as u64) | u64::from(crc32fast::hash(body)) << 32).to_le_bytes();
        record[..HEADER_BYTES].copy_from_slice(&header);
        Ok(record)
    }

    /// The states, the last sequence number, and how many bytes are good.
    fn read(path: &Path, bytes: &[u8]) -> Result<(BTreeMap<VmId, Kept>, u64, usize), JournalError> {
        let mut last = BTreeMap::new();
        let (mut sequence, mut at) = (0, 0);
        while let Some((record, next)) = Self::read_one(&bytes[at..]) {
            if record.saved.version > Saved::VERSION {
                return Err(JournalError::Newer {
                    path: path.to_owned(),
                    version: record.saved.version,
                });
            }
            sequence = sequence.max(record.sequence);
            last.insert(
                record.saved.vm,
                Kept {
                    sequence: record.sequence,
                    saved: record.saved,
                },
            );
            at += next;
        }
        Ok((last, sequence, at))
    }

    /// The first record, and how long it is; `None` at the end or at a bad one.
    fn read_one(bytes: &[u8]) -> Option<(Record<Saved>, usize)> {
        let (length, rest) = bytes.split_first_chunk::<4>()?;
        let (crc, rest) = rest.split_first_chunk::<4>()?;
        let length = usize::try_from(u32::from_le_bytes(*length))
            .ok()
            .filter(|&n| n <= RECORD_BYTES_MAX)?;
        let body = rest.get(..length)?;
        if crc32fast::hash(body) != u32::from_le_bytes(*crc) {
            return None;
        }
        Some((serde_json::from_slice(body).ok()?, HEADER_BYTES + length))
    }
}

#[cfg(test)]
mod tests {
    use model::{Generation, Revision, id};
    use proptest::prelude::*;

    use super::*;

    fn boot() -> BootId {
        id::BootId(uuid::Uuid::from_u128(7))
    }

    fn saved(vm: u128, revision: u64) -> Saved {
        let mut saved = Saved::new(VmId(uuid::Uuid::from_u128(vm)), boot());
        saved.revision = Revision(revision);
        saved.generation = Generation(1);
        saved.role = task::Role::Holder;
        saved
    }

    #[test]
    fn the_last_record_of_each_vm_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = Journal::open(&path, boot()).unwrap();
        for (vm, revision) in [(1, 1), (2, 1), (1, 2), (1, 3)] {
            journal.append(&saved(vm, revision)).unwrap();
        }
        drop(journal);
        let journal = Journal::open(&path, boot()).unwrap();
        let read: Vec<_> = journal.saved().map(|s| s.revision.0).collect();
        assert_eq!(read, [3, 1]);
    }

    #[test]
    fn a_second_agent_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let _first = Journal::open(&path, boot()).unwrap();
        assert!(matches!(Journal::open(&path, boot()), Err(JournalError::InUse { .. })));
    }

    #[test]
    fn a_long_journal_is_compacted_and_keeps_what_it_held() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = Journal::open(&path, boot()).unwrap();
        for revision in 1..20_000 {
            journal.append(&saved(u128::from(revision % 3), revision)).unwrap();
        }
        assert!(fs::metadata(&path).unwrap().len() < COMPACT_BYTES + 4096);
        drop(journal);
        let journal = Journal::open(&path, boot()).unwrap();
        assert_eq!(journal.saved().map(|s| s.revision.0).max(), Some(19_999));
        assert_eq!(journal.saved().count(), 3);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn whatever_becomes_of_the_tail_every_record_before_it_is_read(cut in 0usize..4000, flip in any::<u8>()) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("journal");
            let mut journal = Journal::open(&path, boot()).unwrap();
            let mut ends = vec![];
            for revision in 1..=8 {
                journal.append(&saved(1, revision)).unwrap();
                ends.push(usize::try_from(journal.bytes).unwrap());
            }
            drop(journal);
            let mut bytes = fs::read(&path).unwrap();
            let cut = cut.min(bytes.len());
            bytes.truncate(cut);
            if let Some(last) = bytes.last_mut() {
                *last ^= flip;
            }
            fs::write(&path, &bytes).unwrap();
            let journal = Journal::open(&path, boot()).unwrap();
            let whole = ends.iter().filter(|&&end| end <= cut.saturating_sub(1)).count();
            let read = journal.saved_of(VmId(uuid::Uuid::from_u128(1))).map_or(0, |s| s.revision.0);
            let intact = u64::try_from(ends.iter().filter(|&&end| end <= cut).count()).unwrap();
            prop_assert!(read == u64::try_from(whole).unwrap() || (flip == 0 && read == intact));
        }
    }
}
