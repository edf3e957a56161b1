//! A directory for one build, removed however the build ends; one that a killed build left is removed by the next.

use super::{BuildError, as_root, failed};
use rustix::fs::{FlockOperation, flock, statvfs};
use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const PREFIX: &str = "godwit-debian-";
const LOCK: &str = "lock";
const REMOVAL: Duration = Duration::from_secs(120);

/// The directory; its lock tells others that its build lives.
#[derive(Debug)]
pub(super) struct Scratch {
    path: PathBuf,
    _lock: File,
}

impl Scratch {
    /// Makes one in `parent`, which must have `bytes_min` of free space.
    ///
    /// # Errors
    /// When there is too little space, or it cannot be made.
    pub(super) fn new(parent: &Path, bytes_min: u64) -> Result<Self, BuildError> {
        sweep(parent);
        let space = statvfs(parent).map_err(|error| failed("use", parent)(error.into()))?;
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        if free < bytes_min {
            return Err(BuildError::Space {
                path: parent.into(),
                free_mib: free >> 20,
            });
        }
        let path = parent.join(format!("{PREFIX}{}", uuid::Uuid::new_v4()));
        // Others may pass through, as mmdebstrap asks where it works in a user namespace; they can list nothing.
        let made = DirBuilder::new().mode(0o711).create(&path);
        made.map_err(failed("create", &path))?;
        let lock = path.join(LOCK);
        let held = File::create(&lock).and_then(|file| {
            flock(&file, FlockOperation::NonBlockingLockExclusive)?;
            Ok(file)
        });
        match held {
            Ok(file) => Ok(Self { path, _lock: file }),
            Err(error) => {
                remove(&path);
                Err(failed("lock", &lock)(error))
            }
        }
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Removes what killed builds left: nobody holds its lock.
fn sweep(parent: &Path) {
    let Ok(entries) = std::fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let ours = entry.file_name().to_string_lossy().starts_with(PREFIX);
        // A directory without its lock is one that is just being made, or removed.
        let Ok(lock) = File::open(entry.path().join(LOCK)) else {
            continue;
        };
        if ours && flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            remove(&entry.path());
        }
    }
}

/// As root, since files in it may belong to users of the namespace; and never into another file system.
fn remove(path: &Path) {
    let run = as_root("rm", REMOVAL)
        .arg("--recursive")
        .arg("--force")
        .arg("--one-file-system")
        .arg("--")
        .arg(path);
    // A directory that resists is swept by the next build.
    let _ = run.output();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_with_its_build_and_what_a_killed_build_left_goes_with_the_next() {
        let parent = tempfile::tempdir().unwrap();
        let left = parent.path().join(format!("{PREFIX}left"));
        std::fs::create_dir(&left).unwrap();
        std::fs::write(left.join(LOCK), "").unwrap();
        let others = parent.path().join("others");
        std::fs::create_dir(&others).unwrap();
        std::fs::write(others.join(LOCK), "").unwrap();
        let first = Scratch::new(parent.path(), 1).unwrap();
        assert!(!left.exists() && others.exists());
        std::fs::write(first.path().join("file"), "x").unwrap();
        let second = Scratch::new(parent.path(), 1).unwrap();
        assert!(first.path().join("file").exists(), "a living build was swept");
        let paths = [first.path().to_owned(), second.path().to_owned()];
        drop((first, second));
        assert!(paths.iter().all(|path| !path.exists()));
    }

    #[test]
    fn too_little_space_is_told_before_anything_is_made() {
        let parent = tempfile::tempdir().unwrap();
        let error = Scratch::new(parent.path(), u64::MAX).unwrap_err();
        assert!(error.to_string().contains("TMPDIR"), "{error}");
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0);
    }
}
