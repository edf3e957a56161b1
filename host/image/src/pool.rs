//! A storage pool's directory on this host: blobs by digest, volumes by id, and what is still coming in.
//!
//! ```text
//!   incoming/<uuid>.lock   held (flock) by the agent that owns incoming/<uuid>/
//!   incoming/<uuid>/<n>    files not finished; renamed into place, or removed
//!   blobs/<sha256>         0444, never changed once there
//!   volumes/<uuid>.<format> 0600, of the VM's own user
//!   volumes/<uuid>.seed    0400, what a VM's guest is told at its first start; never changed
//! ```
//!
//! Several hosts may open one shared pool. A host that died leaves its incoming directory unlocked: the next [`Pool::open`]
//! removes it. Directories are 0711: QEMU's own user can open a file whose name it was given, but list nothing.

use model::storage::Digest;
use model::template::Blob;
use rustix::fs::{self, AtFlags, Dir, FlockOperation, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use uuid::Uuid;

pub(crate) const BLOBS: &str = "blobs";
pub(crate) const VOLUMES: &str = "volumes";
/// Readable by each VM's own user; written by nobody, ever.
pub(crate) const BLOB_MODE: Mode = Mode::from_raw_mode(0o444);
const INCOMING: &str = "incoming";
const LOCK_TRIES_MAX: usize = 8;
const DIRECTORY_MODE: Mode = Mode::from_raw_mode(0o711);

/// Why a pool's files could not be reached.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} {path}")]
pub struct PoolError {
    /// `open`, `remove`, ...
    pub doing: &'static str,
    /// Which file or directory.
    pub path: PathBuf,
    /// What the system said.
    #[source]
    pub source: io::Error,
}

/// Why a file that was coming in was not kept. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// More bytes came than were announced.
    #[error("more than the announced {limit} bytes came; announce the right size")]
    TooLong {
        /// How many were allowed.
        limit: u64,
    },
    /// The stream ended early.
    #[error("{got} bytes came of {expected}; send it again")]
    TooShort {
        /// How many were announced.
        expected: u64,
        /// How many came.
        got: u64,
    },
    /// The bytes are not those of the digest.
    #[error("the bytes have SHA-256 {got}, not {expected}; the file was damaged or is another one")]
    Digest {
        /// What was announced.
        expected: Digest,
        /// What came.
        got: Digest,
    },
    /// The sender's stream failed.
    #[error("the stream broke after {got} bytes; send it again")]
    Stream {
        /// How many came before.
        got: u64,
        /// What the stream said.
        #[source]
        source: io::Error,
    },
    /// The pool's own files failed.
    #[error(transparent)]
    Pool(#[from] PoolError),
}

/// Room in a pool's file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// All of it, in bytes.
    pub total_bytes: u64,
    /// What is free for us, in bytes.
    pub free_bytes: u64,
}

/// An open pool. Its incoming files live and die with this value.
#[derive(Debug)]
pub struct Pool {
    path: PathBuf,
    root: OwnedFd,
    session: Uuid,
    /// Held for as long as the pool is open: tells others that our incoming files are alive.
    _lock: OwnedFd,
    next_name: AtomicU64,
}

impl Pool {
    /// Opens the pool at `root`, making its directories when absent, and removes what dead agents left unfinished.
    ///
    /// # Errors
    /// See [`PoolError`].
    pub fn open(root: &Path) -> Result<Self, PoolError> {
        let failed = |doing, path: &Path| {
            let path = path.to_path_buf();
            move |source: io::Error| PoolError { doing, path, source }
        };
        std::fs::create_dir_all(root).map_err(failed("create", root))?;
        let path = root.canonicalize().map_err(failed("resolve", root))?;
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = fs::open(&path, flags, Mode::empty()).map_err(|e| failed("open", &path)(e.into()))?;
        for name in [BLOBS, VOLUMES, INCOMING] {
            make_directory(&root, name).map_err(|e| failed("create", &path.join(name))(e.into()))?;
        }
        let incoming = path.join(INCOMING);
        sweep(&root).map_err(|e| failed("clean", &incoming)(e.into()))?;
        let (session, lock) = begin_session(&root).map_err(|e| failed("lock", &incoming)(e.into()))?;
        Ok(Pool {
            path,
            root,
            session,
            _lock: lock,
            next_name: AtomicU64::new(0),
        })
    }

    /// The pool's directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the blob is; it may be absent. Who opens it by this follows links: see [`Pool::open_blob`].
    pub fn blob_path(&self, digest: Digest) -> PathBuf {
        self.path.join(blob_name(digest))
    }

    /// The blob's size in bytes, `None` when it is not here.
    ///
    /// # Errors
    /// See [`PoolError`].
    pub fn blob_size(&self, digest: Digest) -> Result<Option<u64>, PoolError> {
        let Some(file) = self.open_if_there(&blob_name(digest))? else {
            return Ok(None);
        };
        let data = fs::fstat(&file).map_err(|e| self.error("read", &blob_name(digest), e))?;
        Ok(Some(data.st_size as u64))
    }

    /// Opens a blob for reading.
    ///
    /// # Errors
    /// See [`PoolError`]; an absent blob too.
    pub fn open_blob(&self, digest: Digest) -> Result<File, PoolError> {
        let name = blob_name(digest);
        let file = self.open_beneath(&name, OFlags::RDONLY | OFlags::NONBLOCK)?;
        self.regular(&name, file).map(File::from)
    }

    /// Reads the whole blob again: whether its bytes still are those of its name.
    ///
    /// # Errors
    /// See [`PoolError`]; an absent blob too.
    pub fn blob_is_intact(&self, digest: Digest) -> Result<bool, PoolError> {
        let mut hash = Sha256::new();
        let mut file = self.open_blob(digest)?;
        let read = io::copy(&mut file, &mut hash);
        read.map_err(|source| PoolError {
            doing: "read",
            path: self.blob_path(digest),
            source,
        })?;
        Ok(Digest(hash.finalize().into()) == digest)
    }

    /// The digests of all blobs, in order.
    ///
    /// # Errors
    /// See [`PoolError`].
    pub fn blobs(&self) -> Result<Vec<Digest>, PoolError> {
        let names = names_in(self.root.as_fd(), BLOBS).map_err(|e| self.error("list", BLOBS, e))?;
        let mut digests: Vec<Digest> = names.iter().filter_map(|name| name.parse().ok()).collect();
        digests.sort_unstable();
        Ok(digests)
    }

    /// Removes a blob; false when it was not there. That nothing is based on it is the caller's to know.
    ///
    /// # Errors
    /// See [`PoolError`].
    pub fn delete_blob(&self, digest: Digest) -> Result<bool, PoolError> {
        self.delete(BLOBS, &digest.to_string())
    }

    /// Begins to receive a file of at most `limit` bytes.
    ///
    /// # Errors
    /// See [`PoolError`].
    pub fn incoming(&self, limit: u64) -> Result<Incoming<'_>, PoolError> {
        let number = self.next_name.fetch_add(1, Ordering::Relaxed);
        let name = format!("{INCOMING}/{}/{number}", self.session);
        let file = self.open_beneath(&name, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)?;
        Ok(Incoming {
            pool: self,
            name,
            file: File::from(file),
            hash: Sha256::new(),
            bytes: 0,
            limit,
            kept: false,
        })
    }

    /// Receives a blob from `stream` to its end. One that is already here is not read.
    ///
    /// # Errors
    /// See [`ReceiveError`].
    pub fn receive_blob(&self, blob: Blob, stream: &mut dyn Read) -> Result<(), ReceiveError> {
        if self.blob_size(blob.digest)? == Some(blob.size_bytes) {
            return Ok(());
        }
        let mut incoming = self.incoming(blob.size_bytes)?;
        incoming.read_from(stream)?;
        incoming.keep_as_blob(blob)
    }

    /// Room in the pool's file system.
    ///
    /// # Errors
    /// See [`PoolError`].
    pub fn capacity(&self) -> Result<Capacity, PoolError> {
        let data = fs::fstatvfs(&self.root).map_err(|e| self.error("measure", "", e))?;
        let bytes = |blocks: u64| blocks.saturating_mul(data.f_frsize);
        Ok(Capacity {
            total_bytes: bytes(data.f_blocks),
            free_bytes: bytes(data.f_bavail),
        })
    }

    /// Opens a name of ours beneath the root; new files are 0600.
    pub(crate) fn open_beneath(&self, name: &str, flags: OFlags) -> Result<OwnedFd, PoolError> {
        open_beneath(self.root.as_fd(), name, flags).map_err(|e| self.error("open", name, e))
    }

    /// What was opened, if it is a file: neither a pipe, which nobody may ever write to, nor a device.
    pub(crate) fn regular(&self, name: &str, file: OwnedFd) -> Result<OwnedFd, PoolError> {
        let data = fs::fstat(&file).map_err(|e| self.error("read", name, e))?;
        if !fs::FileType::from_raw_mode(data.st_mode).is_file() {
            return Err(PoolError {
                doing: "use",
                path: self.path.join(name),
                source: io::Error::other("it is no regular file; another host of the pool may have put it there"),
            });
        }
        // It was opened without waiting; whoever gets it may wait.
        let flags = fs::fcntl_getfl(&file).map_err(|e| self.error("read", name, e))?;
        fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK).map_err(|e| self.error("read", name, e))?;
        Ok(file)
    }

    /// As [`Pool::open_beneath`] for reading; `None` when there is no such file.
    pub(crate) fn open_if_there(&self, name: &str) -> Result<Option<OwnedFd>, PoolError> {
        match open_beneath(self.root.as_fd(), name, OFlags::RDONLY) {
            Ok(file) => Ok(Some(file)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(self.error("open", name, error)),
        }
    }

    /// Removes `directory/name` for good; false when it was not there.
    pub(crate) fn delete(&self, directory: &'static str, name: &str) -> Result<bool, PoolError> {
        let parent = self.open_beneath(directory, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let there = match fs::unlinkat(&parent, name, AtFlags::empty()) {
            Ok(()) => true,
            Err(Errno::NOENT) => false,
            Err(error) => return Err(self.error("remove", &format!("{directory}/{name}"), error)),
        };
        fs::fsync(&parent).map_err(|e| self.error("sync", directory, e))?;
        Ok(there)
    }

    pub(crate) fn error(&self, doing: &'static str, name: &str, error: Errno) -> PoolError {
        PoolError {
            doing,
            path: self.path.join(name),
            source: error.into(),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // What cannot be removed now is swept by the next to open the pool.
        let _ = end_session(self.root.as_fd(), &self.session.to_string());
    }
}

/// A file on its way in. Dropped unfinished, it is gone.
#[derive(Debug)]
pub struct Incoming<'a> {
    pool: &'a Pool,
    name: String,
    file: File,
    hash: Sha256,
    bytes: u64,
    limit: u64,
    kept: bool,
}

impl Incoming<'_> {
    /// Where it is while it comes in: for our own `qemu-img` to read or write.
    pub fn path(&self) -> PathBuf {
        self.pool.path.join(&self.name)
    }

    /// How many bytes came so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Appends a piece.
    ///
    /// # Errors
    /// [`ReceiveError::TooLong`] past the limit, [`ReceiveError::Pool`] when the disk is full or fails.
    pub fn write(&mut self, piece: &[u8]) -> Result<(), ReceiveError> {
        if piece.len() as u64 > self.limit - self.bytes {
            return Err(ReceiveError::TooLong { limit: self.limit });
        }
        self.file.write_all(piece).map_err(|source| PoolError {
            doing: "write",
            path: self.path(),
            source,
        })?;
        self.hash.update(piece);
        self.bytes += piece.len() as u64;
        Ok(())
    }

    /// Appends all that `stream` gives.
    ///
    /// # Errors
    /// As for [`Incoming::write`], and [`ReceiveError::Stream`].
    pub fn read_from(&mut self, stream: &mut dyn Read) -> Result<(), ReceiveError> {
        let mut piece = vec![0; 256 << 10];
        loop {
            match stream.read(&mut piece) {
                Ok(0) => return Ok(()),
                Ok(length) => self.write(&piece[..length])?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(ReceiveError::Stream {
                        got: self.bytes,
                        source,
                    });
                }
            }
        }
    }

    /// Whether what was written has the blob's size and digest.
    ///
    /// # Errors
    /// [`ReceiveError::TooShort`] or [`ReceiveError::Digest`] where it has not.
    pub fn check(&self, blob: Blob) -> Result<(), ReceiveError> {
        if self.bytes != blob.size_bytes {
            return Err(ReceiveError::TooShort {
                expected: blob.size_bytes,
                got: self.bytes,
            });
        }
        let got = Digest(self.hash.clone().finalize().into());
        if got != blob.digest {
            return Err(ReceiveError::Digest {
                expected: blob.digest,
                got,
            });
        }
        Ok(())
    }

    /// Checks size and digest and keeps the file as that blob, durably, at once: nobody sees it half.
    ///
    /// # Errors
    /// See [`ReceiveError`].
    pub fn keep_as_blob(self, blob: Blob) -> Result<(), ReceiveError> {
        self.check(blob)?;
        Ok(self.keep(BLOBS, &blob.digest.to_string(), BLOB_MODE)?)
    }

    /// Hashes the file as it is now on disk, however it was written.
    pub(crate) fn rehash(&self) -> Result<Blob, PoolError> {
        let failed = |source| PoolError {
            doing: "read",
            path: self.path(),
            source,
        };
        let mut hash = Sha256::new();
        // A description of its own, so that our position is not moved.
        let mut file = File::from(self.pool.open_beneath(&self.name, OFlags::RDONLY)?);
        let size_bytes = io::copy(&mut file, &mut hash).map_err(failed)?;
        Ok(Blob {
            digest: Digest(hash.finalize().into()),
            size_bytes,
        })
    }

    /// The open file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Sets the mode, syncs, and moves the file to `directory/name`.
    pub(crate) fn keep(mut self, directory: &'static str, name: &str, mode: Mode) -> Result<(), PoolError> {
        let pool = self.pool;
        let target = format!("{directory}/{name}");
        fs::fchmod(&self.file, mode).map_err(|e| pool.error("set the mode of", &self.name, e))?;
        fs::fsync(&self.file).map_err(|e| pool.error("sync", &self.name, e))?;
        fs::renameat(&pool.root, &self.name, &pool.root, &target).map_err(|e| pool.error("create", &target, e))?;
        self.kept = true;
        let parent = pool.open_beneath(directory, OFlags::RDONLY | OFlags::DIRECTORY)?;
        fs::fsync(&parent).map_err(|e| pool.error("sync", directory, e))
    }
}

impl Drop for Incoming<'_> {
    fn drop(&mut self) {
        if !self.kept {
            // What cannot be removed now is removed with the session.
            let _ = fs::unlinkat(&self.pool.root, &self.name, AtFlags::empty());
        }
    }
}

/// `blobs/<digest>`.
pub(crate) fn blob_name(digest: Digest) -> String {
    format!("{BLOBS}/{digest}")
}

fn open_beneath(root: BorrowedFd<'_>, name: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let mode = if flags.contains(OFlags::CREATE) {
        Mode::RUSR | Mode::WUSR
    } else {
        Mode::empty()
    };
    loop {
        // openat2(2): EAGAIN is a rename elsewhere during the walk; the walk is repeated.
        match fs::openat2(root, name, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, mode, resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
}

fn make_directory(root: &OwnedFd, name: &str) -> rustix::io::Result<()> {
    match fs::mkdirat(root, name, DIRECTORY_MODE) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error),
    }
    // Whatever umask said; and a symbolic link planted under this name is refused here.
    let directory = open_beneath(root.as_fd(), name, OFlags::RDONLY | OFlags::DIRECTORY)?;
    fs::fchmod(&directory, DIRECTORY_MODE)
}

/// The names in a directory beneath the root, without `.` and `..`.
fn names_in(root: BorrowedFd<'_>, directory: &str) -> rustix::io::Result<Vec<String>> {
    let directory = open_beneath(root, directory, OFlags::RDONLY | OFlags::DIRECTORY)?;
    let mut names = Vec::new();
    for entry in Dir::read_from(&directory)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
    }
    Ok(names)
}

/// Makes our directory for incoming files, its lock held first.
fn begin_session(root: &OwnedFd) -> rustix::io::Result<(Uuid, OwnedFd)> {
    for _ in 0..LOCK_TRIES_MAX {
        let session = Uuid::new_v4();
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        let lock = open_beneath(root.as_fd(), &lock_name(&session.to_string()), flags)?;
        // Another opener's sweep may find the lock file before we hold it, and remove it: then take a new one.
        if fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() && fs::fstat(&lock)?.st_nlink > 0 {
            fs::mkdirat(root, format!("{INCOMING}/{session}"), DIRECTORY_MODE)?;
            return Ok((session, lock));
        }
    }
    Err(Errno::BUSY)
}

/// Removes the sessions whose owner is gone.
fn sweep(root: &OwnedFd) -> rustix::io::Result<()> {
    for name in names_in(root.as_fd(), INCOMING)? {
        let Some(session) = name.strip_suffix(".lock") else {
            continue;
        };
        let lock = match open_beneath(root.as_fd(), &lock_name(session), OFlags::RDWR) {
            Ok(lock) => lock,
            Err(Errno::NOENT) => continue,
            Err(error) => return Err(error),
        };
        if fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            end_session(root.as_fd(), session)?;
        }
    }
    Ok(())
}

/// Removes a session: its files, its directory, then its lock.
fn end_session(root: BorrowedFd<'_>, session: &str) -> rustix::io::Result<()> {
    let absent_is_fine = |result| match result {
        Err(Errno::NOENT) => Ok(()),
        other => other,
    };
    let directory = format!("{INCOMING}/{session}");
    match names_in(root, &directory) {
        Err(Errno::NOENT) => {}
        names => {
            for name in names? {
                absent_is_fine(fs::unlinkat(root, format!("{directory}/{name}"), AtFlags::empty()))?;
            }
            absent_is_fine(fs::unlinkat(root, &directory, AtFlags::REMOVEDIR))?;
        }
    }
    absent_is_fine(fs::unlinkat(root, lock_name(session), AtFlags::empty()))
}

fn lock_name(session: &str) -> String {
    format!("{INCOMING}/{session}.lock")
}
