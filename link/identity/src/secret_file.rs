//! Files that hold secrets: 0600 from their first byte, whole or absent, and refused when others could have read them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::random::random;

/// Why a secret file was not read.
#[derive(Debug, thiserror::Error)]
pub enum ReadSecretError {
    /// The file cannot be opened or read.
    #[error("cannot read {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Group or others may read, write or execute it.
    #[error(
        "{path} is open to other users (mode {mode:04o}), so its secret may be known; replace the secret, or if you are sure: chmod 600 {path}",
        path = path.display()
    )]
    OpenToOthers {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It belongs to somebody else than root or this process's user.
    #[error("{path} belongs to user {owner}, not to this process's user; chown it or run as that user", path = path.display())]
    ForeignOwner {
        /// The file.
        path: PathBuf,
        /// Its owner's uid.
        owner: u32,
    },
    /// A directory, device, pipe or socket.
    #[error("{} is not a regular file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// Longer than what this file may hold.
    #[error("{path} is longer than {bytes_max} bytes, so it is not what it should be", path = path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The limit.
        bytes_max: u64,
    },
}

/// Why a secret file was not written. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum WriteSecretError {
    /// The file cannot be written.
    #[error("cannot write {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// [`create`] found a file there.
    #[error("{} exists already and is not overwritten", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
}

/// Reads a secret of at most `bytes_max` bytes. Refuses a file that group or others have any right on, or that belongs
/// to somebody else than root or this process's user. The checks are on the opened file, so it cannot be swapped between.
pub fn read(path: &Path, bytes_max: u64) -> Result<Vec<u8>, ReadSecretError> {
    let io = |source| ReadSecretError::Io {
        path: path.to_owned(),
        source,
    };
    // Non-blocking: opening a pipe that nobody writes to must not hang.
    let flags = i32::try_from((OFlags::NONBLOCK | OFlags::NOCTTY).bits()).unwrap_or(0);
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .map_err(io)?;
    let facts = file.metadata().map_err(io)?;
    if !facts.is_file() {
        return Err(ReadSecretError::NotAFile { path: path.to_owned() });
    }
    let mode = facts.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(ReadSecretError::OpenToOthers {
            path: path.to_owned(),
            mode,
        });
    }
    let owner = facts.uid();
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        return Err(ReadSecretError::ForeignOwner {
            path: path.to_owned(),
            owner,
        });
    }
    let mut bytes = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > bytes_max {
        return Err(ReadSecretError::TooLong {
            path: path.to_owned(),
            bytes_max,
        });
    }
    Ok(bytes)
}

/// Writes a secret, replacing what was there in one step. After return it is on disk; on failure the old content stands.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), WriteSecretError> {
    write_beside(path, bytes, |draft| fs::rename(draft, path))
}

/// Writes a secret to a path where nothing is yet; of two at once exactly one succeeds.
pub fn create(path: &Path, bytes: &[u8]) -> Result<(), WriteSecretError> {
    write_beside(path, bytes, |draft| {
        fs::hard_link(draft, path).and_then(|()| fs::remove_file(draft))
    })
}

/// Makes a directory (and its parents) that only this user may enter; an existing one is taken as it is, if it is a
/// directory that only its owner may write to.
pub fn private_directory(path: &Path) -> Result<(), WriteSecretError> {
    let io = |source| WriteSecretError::Io {
        path: path.to_owned(),
        source,
    };
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(io)?;
    let mode = fs::metadata(path).map_err(io)?.mode();
    if mode & 0o022 != 0 {
        let source = io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("other users may write to it; run: chmod go-w {}", path.display()),
        );
        return Err(io(source));
    }
    Ok(())
}

fn write_beside(
    path: &Path,
    bytes: &[u8],
    publish: impl FnOnce(&Path) -> io::Result<()>,
) -> Result<(), WriteSecretError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AlreadyExists => WriteSecretError::Exists { path: path.to_owned() },
        _ => WriteSecretError::Io {
            path: path.to_owned(),
            source,
        },
    };
    let draft = draft_path(path).map_err(failed)?;
    let outcome = write_draft(&draft, bytes)
        .and_then(|()| publish(&draft))
        .and_then(|()| sync_parent(path));
    if outcome.is_err() {
        let _ = fs::remove_file(&draft);
    }
    outcome.map_err(failed)
}

fn draft_path(path: &Path) -> io::Result<PathBuf> {
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    let tag: [u8; 8] = random().map_err(io::Error::other)?;
    name.push(format!(".{:016x}.tmp", u64::from_le_bytes(tag)));
    Ok(path.with_file_name(name))
}

fn write_draft(draft: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(draft)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
        _ => File::open(".")?.sync_all(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_secret_is_0600_whole_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        replace(&path, b"one").unwrap();
        replace(&path, b"two").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(read(&path, 3).unwrap(), b"two");
        assert!(matches!(read(&path, 2), Err(ReadSecretError::TooLong { .. })));
        assert_eq!(names(dir.path()), ["key"]);
    }

    #[test]
    fn create_never_overwrites_and_leaves_no_draft() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        create(&path, b"first").unwrap();
        assert!(matches!(create(&path, b"second"), Err(WriteSecretError::Exists { .. })));
        assert_eq!(read(&path, 100).unwrap(), b"first");
        assert_eq!(names(dir.path()), ["key"]);
        assert!(matches!(
            create(&dir.path().join("no/such/place"), b""),
            Err(WriteSecretError::Io { .. })
        ));
    }

    #[test]
    fn a_file_that_others_may_touch_is_refused_with_the_command_to_run() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        replace(&path, b"secret").unwrap();
        for mode in [0o644, 0o640, 0o602, 0o610] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let refused = read(&path, 100).unwrap_err();
            assert!(matches!(refused, ReadSecretError::OpenToOthers { .. }), "{mode:o}");
            assert!(refused.to_string().contains(&format!("chmod 600 {}", path.display())));
        }
    }

    #[test]
    fn a_pipe_or_directory_in_its_place_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(read(dir.path(), 100), Err(ReadSecretError::NotAFile { .. })));
        let pipe = dir.path().join("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        assert!(matches!(read(&pipe, 100), Err(ReadSecretError::NotAFile { .. })));
    }

    #[test]
    fn a_state_directory_is_private_and_one_that_others_may_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        private_directory(&path).unwrap();
        private_directory(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(private_directory(&path).is_err());
    }
}
