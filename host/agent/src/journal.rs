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
//! - A torn or damaged tail is cut off at the first record whose length or checksum is wrong; nothing after it is read. A part of a
//!   record that could not be written is cut off before the next one is: nothing whole ever lies behind something torn.
//! - A record that is whole and cannot be understood is never cut off: another version of the agent wrote it, of a VM that may run.
//! - Compaction writes a new file and renames it: there is always one whole journal. It runs beside [`Journal::append`], which never
//!   waits for a disk; one that fails is told of and tried again later, and harms no record.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
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
/// Between two tries to write a record, at first and at most.
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// The agent's journal.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    boot: BootId,
    sequence: u64,
    /// Length of what is whole.
    bytes: u64,
    /// Something that is not whole may lie behind it.
    torn: bool,
    /// Nothing is compacted before the file is longer than this, bytes.
    compact_above: u64,
    last: BTreeMap<VmId, Kept>,
}

/// A journal that is being written anew, and does not count yet.
struct Draft {
    path: PathBuf,
    records: Vec<u8>,
    /// The last record of which it knows.
    up_to: u64,
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

/// As much of a record as every version has.
#[derive(Deserialize)]
struct Versioned {
    saved: Version,
}

#[derive(Deserialize)]
struct Version {
    version: u16,
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
    /// A whole record means nothing to this agent.
    #[error(
        "the journal {} has a whole record, at byte {at}, that this godwit cannot read; run the version that wrote it, and do not \
         remove the journal: the VMs that run here are known by it alone",
        path.display()
    )]
    Unreadable {
        /// The journal.
        path: PathBuf,
        /// Where in it the record begins, bytes.
        at: usize,
        /// Why.
        source: serde_json::Error,
    },
    /// A record is longer than can be read back.
    #[error(
        "the state of VM {vm} takes {bytes} bytes, and a record of the journal holds at most {max}",
        max = RECORD_BYTES_MAX
    )]
    TooLong {
        /// The VM.
        vm: VmId,
        /// How long it is, bytes.
        bytes: usize,
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
            torn: false,
            compact_above: COMPACT_BYTES,
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
        self.cut().map_err(|source| self.fail(source))?;
        if let Err(source) = self.file.write_all(&record) {
            self.torn = true;
            // Where this fails too it is done before the next record.
            let _ = self.cut();
            return Err(self.fail(source));
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
        Ok(())
    }

    /// A part of a record must not stay in front of the next one.
    fn cut(&mut self) -> io::Result<()> {
        if self.torn {
            self.file.set_len(self.bytes)?;
            self.torn = false;
        }
        Ok(())
    }

    fn fail(&self, source: io::Error) -> JournalError {
        JournalError::File {
            path: self.path.clone(),
            source,
        }
    }

    /// A handle by which the file can be brought to disk without holding the journal.
    ///
    /// # Errors
    /// [`JournalError::File`].
    pub(crate) fn sync_handle(&self) -> Result<File, JournalError> {
        self.file.try_clone().map_err(|source| self.fail(source))
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

    /// What is to be written anew, if the file is too long for what it holds.
    fn draft(&mut self) -> Option<Result<Draft, JournalError>> {
        if self.bytes <= self.compact_above || self.bytes <= 4 * self.held_bytes() {
            return None;
        }
        // Where this one fails: not again at the very next record.
        self.compact_above = self.bytes + COMPACT_BYTES;
        let mut records = Vec::new();
        for kept in self.last.values() {
            match Self::encode(kept.sequence, self.boot, &kept.saved) {
                Ok(record) => records.extend(record),
                Err(error) => return Some(Err(error)),
            }
        }
        Some(Ok(Draft {
            path: self.path.with_extension("new"),
            records,
            up_to: self.sequence,
        }))
    }

    /// Adds what was appended while the draft was written, and puts it in the journal's place.
    fn replace(&mut self, mut file: File, draft: &Draft) -> Result<(), JournalError> {
        let mut bytes = draft.records.len() as u64;
        for kept in self.last.values().filter(|kept| kept.sequence > draft.up_to) {
            let record = Self::encode(kept.sequence, self.boot, &kept.saved)?;
            file.write_all(&record).map_err(|source| self.fail(source))?;
            bytes += record.len() as u64;
        }
        fs::rename(&draft.path, &self.path).map_err(|source| self.fail(source))?;
        self.file = file;
        self.bytes = bytes;
        self.torn = false;
        self.compact_above = COMPACT_BYTES;
        Ok(())
    }

    fn encode(sequence: u64, boot: BootId, saved: &Saved) -> Result<Vec<u8>, JournalError> {
        let mut record = vec![0; HEADER_BYTES];
        serde_json::to_writer(&mut record, &Record { sequence, boot, saved })
            .map_err(|source| JournalError::Record { vm: saved.vm, source })?;
        let body = &record[HEADER_BYTES..];
        if body.len() > RECORD_BYTES_MAX {
            let bytes = body.len();
            return Err(JournalError::TooLong { vm: saved.vm, bytes });
        }
        let header = ((body.len() as u64) | u64::from(crc32fast::hash(body)) << 32).to_le_bytes();
        record[..HEADER_BYTES].copy_from_slice(&header);
        Ok(record)
    }

    /// The states, the last sequence number, and how many bytes are good.
    fn read(path: &Path, bytes: &[u8]) -> Result<(BTreeMap<VmId, Kept>, u64, usize), JournalError> {
        let mut last = BTreeMap::new();
        let (mut sequence, mut at) = (0, 0);
        while let Some(body) = Self::whole(&bytes[at..]) {
            let record = Self::parse(path, at, body)?;
            sequence = sequence.max(record.sequence);
            last.insert(
                record.saved.vm,
                Kept {
                    sequence: record.sequence,
                    saved: record.saved,
                },
            );
            at += HEADER_BYTES + body.len();
        }
        Ok((last, sequence, at))
    }

    /// The first record's body; `None` at the end, or where it is torn or damaged.
    fn whole(bytes: &[u8]) -> Option<&[u8]> {
        let (length, rest) = bytes.split_first_chunk::<4>()?;
        let (crc, rest) = rest.split_first_chunk::<4>()?;
        // A loss of power may leave zeros, whose checksum is that of nothing.
        let length = usize::try_from(u32::from_le_bytes(*length))
            .ok()
            .filter(|&n| n > 0 && n <= RECORD_BYTES_MAX)?;
        let body = rest.get(..length)?;
        (crc32fast::hash(body) == u32::from_le_bytes(*crc)).then_some(body)
    }

    /// What a whole record says. Its version is looked at first: the rest of a newer one need not be readable.
    fn parse(path: &Path, at: usize, body: &[u8]) -> Result<Record<Saved>, JournalError> {
        let path = || path.to_owned();
        match serde_json::from_slice::<Versioned>(body) {
            Ok(Versioned {
                saved: Version { version },
            }) if version > Saved::VERSION => Err(JournalError::Newer { path: path(), version }),
            _ => serde_json::from_slice(body).map_err(|source| JournalError::Unreadable {
                path: path(),
                at,
                source,
            }),
        }
    }
}

/// Writes the journal anew where it is too long for what it holds. Blocks on the disk; records are appended meanwhile.
///
/// # Errors
/// [`JournalError`]; then the journal is as it was, and this is tried again once it has grown further.
pub(crate) fn compact(journal: &Mutex<Journal>) -> Result<(), JournalError> {
    let lock = || journal.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(draft) = lock().draft() else { return Ok(()) };
    let draft = draft?;
    let fail = |source| JournalError::File {
        path: draft.path.clone(),
        source,
    };
    let replaced = write_draft(&draft)
        .map_err(fail)
        .and_then(|file| lock().replace(file, &draft));
    if replaced.is_err() {
        // A leftover is written over by the next try.
        let _ = fs::remove_file(&draft.path);
    }
    replaced?;
    // Until the new name is on the disk, a loss of power brings the old file back.
    let directory = draft.path.parent().unwrap_or(Path::new("/"));
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(fail)
}

fn write_draft(draft: &Draft) -> io::Result<File> {
    match fs::remove_file(&draft.path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = File::options()
        .read(true)
        .append(true)
        .create_new(true)
        .mode(0o600)
        .open(&draft.path)?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
    file.write_all(&draft.records)?;
    file.sync_data()?;
    Ok(file)
}

/// Writes a record, however often it takes: what follows it was announced by it, so that nothing may happen before. What it is about
/// stands still meanwhile, but for its process.
pub(crate) async fn insist(vm: VmId, mut save: impl FnMut() -> Result<(), JournalError>) {
    let mut pause = RETRY_MIN;
    while let Err(error) = save() {
        tracing::error!(%vm, error = &error as &dyn std::error::Error, "the VM waits: its state cannot be written down; make room or mend the disk");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_MAX);
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
        let journal = Mutex::new(Journal::open(&path, boot()).unwrap());
        for revision in 1..20_000 {
            journal
                .lock()
                .unwrap()
                .append(&saved(u128::from(revision % 3), revision))
                .unwrap();
            compact(&journal).unwrap();
        }
        assert!(fs::metadata(&path).unwrap().len() < COMPACT_BYTES + 4096);
        drop(journal);
        let journal = Journal::open(&path, boot()).unwrap();
        assert_eq!(journal.saved().map(|s| s.revision.0).max(), Some(19_999));
        assert_eq!(journal.saved().count(), 3);
    }

    /// A journal longer than what it holds is worth.
    fn long(path: &Path) -> Mutex<Journal> {
        let mut journal = Journal::open(path, boot()).unwrap();
        let mut revision = 0;
        while journal.bytes <= COMPACT_BYTES {
            revision += 1;
            journal.append(&saved(1, revision)).unwrap();
        }
        Mutex::new(journal)
    }

    #[test]
    fn a_record_that_comes_while_the_journal_is_written_anew_is_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let journal = long(&path);
        let draft = journal.lock().unwrap().draft().unwrap().unwrap();
        let file = write_draft(&draft).unwrap();
        journal.lock().unwrap().append(&saved(1, 900_000)).unwrap();
        journal.lock().unwrap().append(&saved(2, 900_001)).unwrap();
        journal.lock().unwrap().replace(file, &draft).unwrap();
        journal.lock().unwrap().append(&saved(3, 900_002)).unwrap();
        drop(journal);
        let read = Journal::open(&path, boot()).unwrap();
        let revisions: Vec<_> = read.saved().map(|saved| saved.revision.0).collect();
        assert_eq!(revisions, [900_000, 900_001, 900_002]);
        assert!(fs::metadata(&path).unwrap().len() < 8192);
    }

    #[test]
    fn a_compaction_that_fails_harms_no_record_and_is_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let journal = long(&path);
        // The draft's name is taken by what cannot be removed as a file.
        fs::create_dir(path.with_extension("new")).unwrap();
        compact(&journal).unwrap_err();
        let before = journal.lock().unwrap().bytes;
        journal.lock().unwrap().append(&saved(1, 900_000)).unwrap();
        compact(&journal).unwrap();
        assert!(journal.lock().unwrap().bytes > before, "not at once again");
        fs::remove_dir(path.with_extension("new")).unwrap();
        journal.lock().unwrap().compact_above = COMPACT_BYTES;
        compact(&journal).unwrap();
        assert!(journal.lock().unwrap().bytes < 4096);
        drop(journal);
        assert_eq!(
            Journal::open(&path, boot()).unwrap().saved().next().unwrap().revision.0,
            900_000
        );
    }

    /// On this device every write fails for want of room, and nothing can be cut off.
    fn full() -> File {
        File::options().write(true).open("/dev/full").unwrap()
    }

    #[test]
    fn what_a_failed_write_left_is_cut_off_before_the_next_record() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = Journal::open(&path, boot()).unwrap();
        journal.append(&saved(1, 1)).unwrap();
        let good = std::mem::replace(&mut journal.file, full());
        journal.append(&saved(1, 2)).unwrap_err();
        assert!(journal.torn, "it could not be cut off");
        journal.append(&saved(1, 3)).unwrap_err();
        // Some of it had reached the file.
        (&good).write_all(&[40, 0, 0, 0, 1, 2]).unwrap();
        journal.file = good;
        journal.append(&saved(1, 4)).unwrap();
        journal.append(&saved(2, 5)).unwrap();
        drop(journal);
        let read = Journal::open(&path, boot()).unwrap();
        assert_eq!(read.saved().map(|saved| saved.revision.0).collect::<Vec<_>>(), [4, 5]);
    }

    /// A record as another version may have written it.
    fn foreign(change: impl FnOnce(&mut serde_json::Value)) -> Vec<u8> {
        let ours = Journal::encode(2, boot(), &saved(2, 1)).unwrap();
        let mut record: serde_json::Value = serde_json::from_slice(&ours[HEADER_BYTES..]).unwrap();
        change(&mut record);
        let body = serde_json::to_vec(&record).unwrap();
        let mut bytes = u32::try_from(body.len()).unwrap().to_le_bytes().to_vec();
        bytes.extend(crc32fast::hash(&body).to_le_bytes());
        bytes.extend(body);
        bytes
    }

    #[test]
    fn a_whole_record_that_means_nothing_here_is_refused_and_nothing_is_cut_off() {
        let newer = |record: &mut serde_json::Value| {
            record["saved"]["version"] = 7.into();
            record["saved"]["role"] = serde_json::json!({"role": "twin"});
        };
        let strange = |record: &mut serde_json::Value| record["saved"]["role"] = serde_json::json!({"role": "twin"});
        let dir = tempfile::tempdir().unwrap();
        for (name, record) in [("newer", foreign(newer)), ("strange", foreign(strange))] {
            let path = dir.path().join(name);
            let mut journal = Journal::open(&path, boot()).unwrap();
            journal.append(&saved(1, 1)).unwrap();
            (&journal.file).write_all(&record).unwrap();
            (&journal.file)
                .write_all(&Journal::encode(3, boot(), &saved(3, 1)).unwrap())
                .unwrap();
            drop(journal);
            let before = fs::read(&path).unwrap();
            match (name, Journal::open(&path, boot())) {
                ("newer", Err(JournalError::Newer { version: 7, .. }))
                | ("strange", Err(JournalError::Unreadable { .. })) => {}
                (name, other) => panic!("{name}: {other:?}"),
            }
            assert_eq!(fs::read(&path).unwrap(), before);
        }
    }

    #[test]
    fn zeros_that_a_loss_of_power_left_are_a_torn_tail() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = Journal::open(&path, boot()).unwrap();
        journal.append(&saved(1, 1)).unwrap();
        (&journal.file).write_all(&[0; 4096]).unwrap();
        drop(journal);
        assert_eq!(Journal::open(&path, boot()).unwrap().saved().count(), 1);
    }

    #[test]
    fn a_state_that_could_not_be_read_back_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = Journal::open(&path, boot()).unwrap();
        journal.append(&saved(1, 1)).unwrap();
        let mut long = saved(2, 1);
        long.answer = Some(model::order::Happening::Kept {
            reason: model::Refusal::new(model::Code::HostFailed, "x".repeat(RECORD_BYTES_MAX)),
        });
        let refused = journal.append(&long).unwrap_err();
        assert!(matches!(refused, JournalError::TooLong { .. }), "{refused}");
        journal.append(&saved(3, 1)).unwrap();
        drop(journal);
        assert_eq!(Journal::open(&path, boot()).unwrap().saved().count(), 2);
    }

    #[tokio::test]
    async fn nothing_goes_on_before_a_record_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = Journal::open(&path, boot()).unwrap();
        let vm = saved(1, 1).vm;
        let good = std::mem::replace(&mut journal.file, full());
        let (mut good, mut tries) = (Some(good), 0);
        insist(vm, || {
            tries += 1;
            if tries == 3 {
                journal.file = good.take().unwrap();
            }
            journal.append(&saved(1, 7))
        })
        .await;
        assert_eq!(tries, 3);
        drop(journal);
        assert_eq!(
            Journal::open(&path, boot()).unwrap().saved_of(vm).unwrap().revision.0,
            7
        );
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
