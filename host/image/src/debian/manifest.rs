//! The finished disk and its description.

use super::{BuildError, DISK_BYTES, Progress, Step, Suite, failed, root, root::Tree};
use crate::import::percent;
use crate::micro::{Artifact, digest};
use crate::process::Run;
use crate::vet::vet;
use model::storage::{Digest, Format};
use model::template::{Boot, Content, Disk, Seed};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::path::Path;
use std::time::{Duration, SystemTime};

const DISK: &str = "disk.qcow2";
const MANIFEST: &str = "manifest.json";
const VERSION: u32 = 1;
const MANIFEST_BYTES_MAX: u64 = 64 << 10;
const PACKING: Duration = Duration::from_secs(1800);
/// Least memory, MiB: cloud-init and the initial RAM disk want it for a moment.
const MEMORY_MIB_MIN: u64 = 384;

/// A Debian template as files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DebianFiles {
    /// The form of this description; 1.
    pub version: u32,
    /// What it was built by; one that was built otherwise is not used again.
    pub recipe: Digest,
    /// The release's code name.
    pub suite: String,
    /// The kernel's release, as `uname -r` says in the guest.
    pub kernel_release: String,
    /// How many packages it has.
    pub packages: usize,
    /// When it was built, seconds since 1970.
    pub built_at_s: u64,
    /// The disk, qcow2.
    pub disk: Artifact,
    /// The disk's size as the guest sees it.
    pub disk_size_bytes: u64,
}

impl DebianFiles {
    /// What was built in `directory` from the same recipe not longer than `age_max` ago.
    #[must_use]
    pub fn built(directory: &Path, suite: Suite, age_max: Duration) -> Option<Self> {
        let path = directory.join(MANIFEST);
        let size = |path: &Path| std::fs::metadata(path).ok().map(|data| data.len());
        size(&path).filter(|size| *size <= MANIFEST_BYTES_MAX)?;
        let files: Self = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
        let age = now_s().checked_sub(files.built_at_s)?;
        let same = files.version == VERSION && files.recipe == recipe(suite) && files.disk.file == DISK;
        let whole = size(&directory.join(DISK)) == Some(files.disk.size_bytes);
        (same && whole && age <= age_max.as_secs()).then_some(files)
    }

    /// The template's content once its disk is a blob.
    #[must_use]
    pub fn content(&self) -> Content {
        Content {
            boot: Boot::Bios,
            disk: Some(Disk {
                blob: self.disk.blob(),
                format: Format::Qcow2,
                size_bytes: self.disk_size_bytes,
            }),
            memory_mib_min: MEMORY_MIB_MIN,
            seed: Seed::NoCloud,
        }
    }
}

/// Packs the disk as qcow2 into `directory`, vets it as a stranger's would be, and describes it.
///
/// # Errors
/// When it cannot be packed, or is not sound.
pub(super) fn pack(
    directory: &Path,
    raw: &Path,
    suite: Suite,
    tree: &Tree,
    progress: &mut dyn FnMut(Progress),
) -> Result<DebianFiles, BuildError> {
    let building = directory.join(format!(".building-{}", uuid::Uuid::new_v4()));
    let result = pack_into(&building, directory, raw, suite, tree, progress);
    if result.is_err() {
        let _ = std::fs::remove_file(&building);
    }
    result
}

fn pack_into(
    building: &Path,
    directory: &Path,
    raw: &Path,
    suite: Suite,
    tree: &Tree,
    progress: &mut dyn FnMut(Progress),
) -> Result<DebianFiles, BuildError> {
    let run = Run::new("qemu-img", PACKING)
        .args([
            "convert",
            "-p",
            "-c",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-o",
            "compression_type=zstd",
        ])
        .arg(raw)
        .arg(building);
    let packed = run.output_seen(&mut |piece| {
        if let Some(percent) = percent(piece) {
            progress(Progress {
                bytes_done: (DISK_BYTES as f64 * percent / 100.0) as u64,
                bytes_total: DISK_BYTES,
                ..Progress::of(Step::Pack, "packing the disk")
            });
        }
    });
    packed.map_err(BuildError::program("pack the disk"))?;
    progress(Progress::of(Step::Manifest, "vetting and hashing the disk"));
    let info = vet(building, Format::Qcow2)?;
    let (size_bytes, sha256) = digest(building).map_err(failed("read", building))?;
    let files = DebianFiles {
        version: VERSION,
        recipe: recipe(suite),
        suite: suite.codename().into(),
        kernel_release: tree.kernel.clone(),
        packages: tree.packages,
        built_at_s: now_s(),
        disk: Artifact {
            file: DISK.into(),
            size_bytes,
            sha256,
        },
        disk_size_bytes: info.virtual_bytes,
    };
    let (disk, manifest) = (directory.join(DISK), directory.join(MANIFEST));
    // A description of another disk must not be found beside this one.
    match std::fs::remove_file(&manifest) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed("replace", &manifest)(error)),
        _ => {}
    }
    std::fs::rename(building, &disk).map_err(failed("write", &disk))?;
    let text = serde_json::to_vec_pretty(&files).map_err(|error| failed("write", &manifest)(error.into()))?;
    std::fs::write(&manifest, text).map_err(failed("write", &manifest))?;
    Ok(files)
}

/// A digest of all that this program decides about the image.
fn recipe(suite: Suite) -> Digest {
    let mut hash = Sha256::new();
    hash.update(format!(
        "{} {DISK_BYTES} {:?} {:?}",
        suite.codename(),
        root::PACKAGES,
        root::FILES
    ));
    Digest(hash.finalize().into())
}

fn now_s() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(directory: &Path, files: &DebianFiles) {
        std::fs::write(directory.join(MANIFEST), serde_json::to_vec(files).unwrap()).unwrap();
    }

    #[test]
    fn only_a_young_whole_disk_of_the_same_recipe_is_used_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let day = Duration::from_secs(86_400);
        let built = |suite| DebianFiles::built(path, suite, day);
        assert_eq!(built(Suite::Bookworm), None);
        std::fs::write(path.join(DISK), "disk").unwrap();
        let files = DebianFiles {
            version: VERSION,
            recipe: recipe(Suite::Bookworm),
            suite: "bookworm".into(),
            kernel_release: "6.1.0".into(),
            packages: 1,
            built_at_s: now_s() - 60,
            disk: Artifact {
                file: DISK.into(),
                size_bytes: 4,
                sha256: Digest([0; 32]),
            },
            disk_size_bytes: DISK_BYTES,
        };
        write(path, &files);
        assert_eq!(built(Suite::Bookworm), Some(files.clone()));
        assert_eq!(built(Suite::Trixie), None);
        assert_eq!(DebianFiles::built(path, Suite::Bookworm, Duration::from_secs(30)), None);
        for wrong in [
            DebianFiles {
                version: 2,
                ..files.clone()
            },
            DebianFiles {
                built_at_s: u64::MAX,
                ..files.clone()
            },
            DebianFiles {
                disk: Artifact {
                    file: "../disk.qcow2".into(),
                    ..files.disk.clone()
                },
                ..files.clone()
            },
        ] {
            write(path, &wrong);
            assert_eq!(built(Suite::Bookworm), None, "{wrong:?}");
        }
        write(path, &files);
        std::fs::write(path.join(DISK), "cut").unwrap();
        assert_eq!(built(Suite::Bookworm), None);
    }
}
