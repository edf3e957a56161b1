//! The probe's verdict on the accelerators, kept for as long as what it judged is the same: a restart must not cost seconds.

use std::{
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use identity::secret_file;
use model::{BootId, host::Accelerator};
use qemu::{Capabilities, ProbeError, Program, Verdict};
use serde::{Deserialize, Serialize};

use crate::shared::Shared;

/// Form of the record.
const VERSION: u16 = 1;

/// A verdict and what it is about.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    version: u16,
    about: About,
    accelerator: Accelerator,
    reason: String,
}

/// What a verdict depends on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct About {
    /// Another boot may be of another kernel, or of another machine below this one.
    boot: BootId,
    /// What QEMU says that it is.
    qemu: String,
    /// Its file: path, device, inode, bytes, and when it was changed.
    file: Option<(PathBuf, u64, u64, u64, i64, i64)>,
    /// What opening KVM's device gives.
    kvm: String,
}

impl About {
    fn now(boot: BootId, program: &Program, capabilities: &Capabilities) -> Self {
        let file = program.file().and_then(|path| {
            let seen = std::fs::metadata(&path).ok()?;
            let (device, inode, bytes) = (seen.dev(), seen.ino(), seen.len());
            Some((path, device, inode, bytes, seen.mtime(), seen.mtime_nsec()))
        });
        let kvm = match qemu::open_kvm() {
            Ok(_) => "it opens".to_owned(),
            Err(error) => error.kind().to_string(),
        };
        let qemu = format!("{} {}", capabilities.version, capabilities.package);
        Self { boot, qemu, file, kvm }
    }
}

/// The verdict: kept, or of a probe now.
pub(crate) async fn of(shared: &Shared, program: &Program, capabilities: &Capabilities) -> Result<Verdict, ProbeError> {
    let path = shared.config.run_dir.join("accelerator.json");
    let about = About::now(shared.boot, program, capabilities);
    match read(&path, &about) {
        Ok(Some(verdict)) => return Ok(verdict),
        Ok(None) => {}
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the last probe's verdict is of no use; probing again");
        }
    }
    let verdict = qemu::probe(program).await?;
    let kept = Kept {
        version: VERSION,
        about,
        accelerator: verdict.accelerator,
        reason: verdict.reason.clone(),
    };
    let written = serde_json::to_vec(&kept).map_err(io::Error::from);
    if let Err(error) = written.and_then(|bytes| secret_file::replace(&path, &bytes).map_err(io::Error::other)) {
        tracing::warn!(path = %path.display(), %error, "the probe's verdict was not kept; the next start probes again");
    }
    Ok(verdict)
}

/// The verdict that is kept about just this.
fn read(path: &Path, about: &About) -> io::Result<Option<Verdict>> {
    let bytes = match std::fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        bytes => bytes?,
    };
    let kept: Kept = serde_json::from_slice(&bytes)?;
    let same = kept.version == VERSION && kept.about == *about;
    Ok(same.then_some(Verdict {
        accelerator: kept.accelerator,
        reason: kept.reason,
    }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test ends where its promise is broken")]

    use std::{os::unix::fs::PermissionsExt as _, time::Instant};

    use uuid::Uuid;

    use super::*;
    use crate::fixture::Cell;

    #[tokio::test]
    async fn a_verdict_is_kept_for_the_same_boot_and_qemu_only() {
        let cell = Cell::new();
        let shared = cell.host(1).await;
        let program = Program::locate(None);
        let capabilities = qemu::discover(&program).await.unwrap();
        let began = Instant::now();
        let first = of(&shared, &program, &capabilities).await.unwrap();
        let probed = began.elapsed();
        let began = Instant::now();
        assert_eq!(of(&shared, &program, &capabilities).await.unwrap(), first);
        assert!(began.elapsed() < probed / 5, "{:?} against {probed:?}", began.elapsed());

        let path = shared.config.run_dir.join("accelerator.json");
        let about = About::now(shared.boot, &program, &capabilities);
        assert!(about.file.is_some(), "the installed QEMU is a file in the search path");
        assert_eq!(read(&path, &about).unwrap(), Some(first));
        let other = |change: fn(&mut About)| {
            let mut about = about.clone();
            change(&mut about);
            read(&path, &about).unwrap()
        };
        assert_eq!(other(|about| about.boot = BootId(Uuid::nil())), None);
        assert_eq!(other(|about| about.qemu = "7.2.0".to_owned()), None);
        assert_eq!(other(|about| about.kvm = "the module came".to_owned()), None);
        assert_eq!(other(|about| about.file = None), None);

        // What is damaged is no verdict, and no failure either.
        std::fs::write(&path, "{").unwrap();
        assert!(read(&path, &about).is_err());
        of(&shared, &program, &capabilities).await.unwrap();
        assert!(read(&path, &about).unwrap().is_some());
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
