//! Blobs: kernels, initial RAM disks and disk images that people upload and hosts fetch. A file is there under its digest
//! only when all its bytes are, are on disk, and have that digest.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use model::{Digest, Refusal, refusal::Code, template::Blob};
use sha2::{Digest as _, Sha256};
use tokio::sync::{Semaphore, mpsc};
use uuid::Uuid;

/// Largest blob, bytes.
pub const BLOB_BYTES_MAX: u64 = 256 << 30;

/// Uploads at a time.
const UPLOADS_MAX: usize = 4;

/// Pieces of an upload that wait to be written.
const PIECES_MAX: usize = 16;

/// Longest wait for the next piece of an upload.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// How long an uploaded blob waits for the template that names it.
pub(crate) const UNNAMED_KEPT: Duration = Duration::from_secs(3600);

const DRAFT: &str = "draft-";

/// The directory of blobs.
#[derive(Clone, Debug)]
pub(crate) struct Blobs {
    directory: PathBuf,
    uploads: Arc<Semaphore>,
}

impl Blobs {
    /// Opens the directory and removes what uploads of an earlier process left.
    pub(crate) fn open(directory: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&directory)?;
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(DRAFT) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(Self {
            directory,
            uploads: Arc::new(Semaphore::new(UPLOADS_MAX)),
        })
    }

    fn path(&self, digest: Digest) -> PathBuf {
        self.directory.join(digest.to_string())
    }

    /// Takes an upload. One that is there already with that digest and size is not read.
    pub(crate) async fn put<S, E>(&self, blob: Blob, mut pieces: S) -> Result<(), Refusal>
    where
        S: Stream<Item = Result<Bytes, E>> + Unpin,
        E: std::fmt::Display,
    {
        if blob.size_bytes == 0 || blob.size_bytes > BLOB_BYTES_MAX {
            let message = format!("a blob has 1 to {BLOB_BYTES_MAX} bytes, not {}", blob.size_bytes);
            return Err(Refusal::new(Code::InvalidInput, message));
        }
        if self.has(blob) {
            // It waits for its template from now on.
            let touched = File::open(self.path(blob.digest)).and_then(|file| file.set_modified(SystemTime::now()));
            return touched.map_err(|error| cannot_store(&error));
        }
        let Ok(_permit) = self.uploads.try_acquire() else {
            let message = format!("{UPLOADS_MAX} uploads are under way, which is all that is taken at a time");
            return Err(Refusal::new(Code::Overloaded, message).hint("try again when one of them is done"));
        };
        let draft = Draft(self.directory.join(format!("{DRAFT}{}", Uuid::now_v7())));
        let (to_writer, from_upload) = mpsc::channel(PIECES_MAX);
        let (path, place) = (draft.0.clone(), self.path(blob.digest));
        // The draft goes with the writer: it is removed after the last byte was written to it, not before.
        let writer = tokio::task::spawn_blocking(move || {
            let outcome = write(&path, from_upload, blob, &place);
            drop(draft);
            outcome
        });
        let sent = forward(&mut pieces, to_writer, blob.size_bytes).await;
        let written = writer.await.unwrap_or(Err(PutError::Cut));
        // A writer that failed is why the rest was not taken.
        match (written, sent) {
            (Err(PutError::Io(error)), _) => Err(cannot_store(&error)),
            (_, Err(refusal)) => Err(refusal),
            (Err(error), Ok(())) => Err(Refusal::new(Code::InvalidInput, error.to_string())
                .hint("upload it again; if it fails again, check the file")),
            (Ok(()), Ok(())) => Ok(()),
        }
    }

    /// Whether this blob is there, whole.
    pub(crate) fn has(&self, blob: Blob) -> bool {
        fs::metadata(self.path(blob.digest)).is_ok_and(|found| found.is_file() && found.len() == blob.size_bytes)
    }

    /// Opens a blob to read; its size, bytes.
    pub(crate) fn open_blob(&self, digest: Digest) -> io::Result<(File, u64)> {
        let file = File::open(self.path(digest))?;
        let size_bytes = file.metadata()?.len();
        Ok((file, size_bytes))
    }

    /// Removes blobs that no host will fetch: not `wanted`, and uploaded longer ago than [`UNNAMED_KEPT`].
    pub(crate) fn sweep(&self, wanted: &BTreeSet<Digest>, now: SystemTime) -> io::Result<usize> {
        let mut removed = 0;
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            let Ok(digest) = entry.file_name().to_string_lossy().parse::<Digest>() else {
                continue;
            };
            let age = now.duration_since(entry.metadata()?.modified()?).unwrap_or_default();
            if !wanted.contains(&digest) && age > UNNAMED_KEPT {
                fs::remove_file(entry.path())?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}

/// Removes the file when the upload is over, whole or not: a whole one has a second name by then.
struct Draft(PathBuf);

impl Drop for Draft {
    fn drop(&mut self) {
        // What cannot be removed now is removed at the next start.
        let _ = fs::remove_file(&self.0);
    }
}

#[derive(Debug, thiserror::Error)]
enum PutError {
    #[error("the upload was cut")]
    Cut,
    #[error("the upload ended after {got} of {size} bytes")]
    Short { got: u64, size: u64 },
    #[error("the upload's digest is {got}, not {wanted}")]
    Digest { got: Digest, wanted: Digest },
    #[error(transparent)]
    Io(#[from] io::Error),
}

fn cannot_store(error: &io::Error) -> Refusal {
    let hint = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free space on the controller's disk, then try again"
        }
        _ => "look at the controller's disk, then try again",
    };
    Refusal::new(Code::ReadOnly, format!("the controller cannot store the blob: {error}")).hint(hint)
}

async fn forward<S, E>(pieces: &mut S, to_writer: mpsc::Sender<Bytes>, size: u64) -> Result<(), Refusal>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
    E: std::fmt::Display,
{
    let mut left = size;
    loop {
        let piece = match tokio::time::timeout(SILENCE_MAX, pieces.next()).await {
            Err(_) => {
                let message = format!("the upload was silent for {} s", SILENCE_MAX.as_secs());
                return Err(Refusal::new(Code::TimedOut, message));
            }
            Ok(None) => return Ok(()),
            Ok(Some(Err(error))) => {
                return Err(Refusal::new(Code::InvalidInput, format!("the upload was cut: {error}")));
            }
            Ok(Some(Ok(piece))) => piece,
        };
        let length = piece.len() as u64;
        if length > left {
            let message = format!("the upload has more than the {size} bytes that were announced");
            return Err(Refusal::new(Code::InvalidInput, message));
        }
        left -= length;
        if to_writer.send(piece).await.is_err() {
            // The writer failed and says why.
            return Ok(());
        }
    }
}

fn write(draft: &Path, mut pieces: mpsc::Receiver<Bytes>, blob: Blob, place: &Path) -> Result<(), PutError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(draft)?;
    let (mut hash, mut got) = (Sha256::new(), 0);
    while let Some(piece) = pieces.blocking_recv() {
        hash.update(&piece);
        file.write_all(&piece)?;
        got += piece.len() as u64;
    }
    if got != blob.size_bytes {
        return Err(PutError::Short {
            got,
            size: blob.size_bytes,
        });
    }
    let digest = Digest(hash.finalize().into());
    if digest != blob.digest {
        return Err(PutError::Digest {
            got: digest,
            wanted: blob.digest,
        });
    }
    file.sync_all()?;
    fs::rename(draft, place)?;
    if let Some(directory) = place.parent() {
        File::open(directory)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use futures_util::stream;

    use super::*;

    fn blob_of(bytes: &[u8]) -> Blob {
        Blob {
            digest: Digest(Sha256::digest(bytes).into()),
            size_bytes: bytes.len() as u64,
        }
    }

    fn pieces(bytes: &[u8]) -> impl Stream<Item = Result<Bytes, io::Error>> + Unpin {
        let pieces: Vec<_> = bytes.chunks(3).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        stream::iter(pieces)
    }

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[tokio::test]
    async fn an_upload_is_there_whole_or_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(directory.path().to_owned()).unwrap();
        let content = b"a kernel, more or less";
        let blob = blob_of(content);
        let short = Blob {
            size_bytes: 1000,
            ..blob
        };
        let long = Blob { size_bytes: 5, ..blob };
        let other = Blob {
            digest: Digest([1; 32]),
            ..blob
        };
        for (wrong, why) in [
            (short, "ended after 22 of 1000"),
            (long, "more than the 5"),
            (other, "digest is"),
        ] {
            let refusal = blobs.put(wrong, pieces(content)).await.unwrap_err();
            assert!(
                refusal.code == Code::InvalidInput && refusal.message.contains(why),
                "{refusal:?}"
            );
            assert!(names(directory.path()).is_empty());
        }
        let cut = stream::iter([Ok(Bytes::from_static(b"a ker")), Err(io::Error::other("reset"))]);
        assert!(blobs.put(blob, cut).await.unwrap_err().message.contains("cut: reset"));
        assert!(names(directory.path()).is_empty() && !blobs.has(blob));

        blobs.put(blob, pieces(content)).await.unwrap();
        assert!(blobs.has(blob) && !blobs.has(short));
        assert_eq!(names(directory.path()), [blob.digest.to_string()]);
        assert_eq!(blobs.open_blob(blob.digest).unwrap().1, 22);
        let unread = stream::iter([Err::<Bytes, _>("not read again")]);
        blobs.put(blob, unread).await.unwrap();
    }

    #[tokio::test]
    async fn sizes_out_of_bounds_are_refused_before_a_byte_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(directory.path().to_owned()).unwrap();
        for size_bytes in [0, BLOB_BYTES_MAX + 1, u64::MAX] {
            let blob = Blob {
                digest: Digest([0; 32]),
                size_bytes,
            };
            let unread = stream::iter([Err::<Bytes, _>("read")]);
            assert!(blobs.put(blob, unread).await.unwrap_err().message.contains("1 to"));
        }
    }

    #[tokio::test]
    async fn an_unwanted_blob_goes_after_its_time_and_a_draft_of_an_earlier_process_at_the_start() {
        let directory = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(directory.path().to_owned()).unwrap();
        let blob = blob_of(b"x");
        blobs.put(blob, pieces(b"x")).await.unwrap();
        let (now, later) = (SystemTime::now(), SystemTime::now() + UNNAMED_KEPT * 2);
        assert_eq!(blobs.sweep(&BTreeSet::new(), now).unwrap(), 0);
        assert_eq!(blobs.sweep(&BTreeSet::from([blob.digest]), later).unwrap(), 0);
        fs::write(directory.path().join(format!("{DRAFT}1")), "left").unwrap();
        let blobs = Blobs::open(directory.path().to_owned()).unwrap();
        assert_eq!(names(directory.path()).len(), 1);
        assert_eq!(blobs.sweep(&BTreeSet::new(), later).unwrap(), 1);
        assert!(!blobs.has(blob));
    }
}
