//! The micro template: a kernel and a busybox initramfs that serve HTTP two or three seconds after QEMU's start.
//!
//! The guest's requests are listed in `micro/http.rs`; [`stream`] has the downloads' byte stream and its checksum. The
//! guest reads from its kernel command line: `godwit.ip=A.B.C.D/N` or `godwit.ip=dhcp`, `godwit.gw=A.B.C.D`, `godwit.name=NAME`,
//! `godwit.mtu=N`, all optional.

mod cpio;
mod initrd;
mod manifest;
mod modules;
mod packages;
#[path = "../../micro/stream.rs"]
pub mod stream;

pub(crate) use manifest::digest;
pub use manifest::{Artifact, ManifestError, TemplateFiles};
pub use packages::SourceError;

use crate::process::{Run, RunError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What the guest's kernel is always told. `panic=1`: a panic reboots. The rest keeps emulated boots short (the kernel's
/// self-tests of its ciphers alone take 0.2 s there) and the serial console readable.
pub const BASE_COMMAND_LINE: &str = "console=ttyS0 panic=1 quiet random.trust_cpu=on 8250.nr_uarts=1 cryptomgr.notests";

/// The virtual size of the template's blank disk.
pub const DISK_BYTES: u64 = 64 << 20;

/// Where the parts come from.
#[derive(Clone, Debug)]
pub struct Sources {
    /// Keeps unpacked packages from one build to the next; made when absent.
    pub cache: PathBuf,
    /// Use this kernel image and this directory of modules (`/lib/modules/RELEASE`) instead of looking for some.
    pub kernel: Option<(PathBuf, PathBuf)>,
    /// Use this statically linked busybox instead of looking for one.
    pub busybox: Option<PathBuf>,
}

impl Sources {
    /// Finds everything itself, unpacking packages under `cache`.
    pub fn found(cache: impl Into<PathBuf>) -> Self {
        Sources {
            cache: cache.into(),
            kernel: None,
            busybox: None,
        }
    }
}

/// A step of the build, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Looking for a kernel, or fetching and unpacking its package.
    Kernel,
    /// The same for busybox.
    Busybox,
    /// Collecting the kernel modules and writing the initramfs.
    Initrd,
    /// Making the blank disk.
    Disk,
    /// Hashing the files and writing the manifest.
    Manifest,
}

/// What the build is doing.
#[derive(Clone, Debug)]
pub struct Progress {
    /// The step under way.
    pub step: Step,
    /// For people: what exactly.
    pub detail: String,
    /// Bytes of the step done so far.
    pub bytes_done: u64,
    /// Bytes of the step in all; 0 when not known yet.
    pub bytes_total: u64,
}

/// Why the template was not built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A part could not be had.
    #[error("the micro template lacks a part")]
    Source(#[from] SourceError),
    /// The kernel's modules do not make a working guest.
    #[error("kernel {release} cannot run the micro guest: {reason}")]
    Modules {
        /// The kernel's release.
        release: String,
        /// What is wrong with its modules.
        reason: String,
    },
    /// qemu-img did not make the disk.
    #[error("cannot make the template's disk")]
    Disk(#[source] RunError),
    /// A file could not be read or written.
    #[error("cannot {doing} {path}")]
    File {
        /// `read`, `write`, ...
        doing: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Makes the template in `directory` (created when absent) and describes it in `directory/manifest.json`.
///
/// The same parts give the same bytes. Nothing is installed on this machine: packages that are not there are downloaded
/// with `apt-get download` and unpacked under the cache. The files are put in place together, the manifest last: a
/// directory without one is no template, and a build that fails leaves what was there before.
///
/// # Errors
/// See [`BuildError`].
pub fn build(
    directory: &Path,
    sources: &Sources,
    progress: &mut dyn FnMut(Progress),
) -> Result<TemplateFiles, BuildError> {
    let existed = directory.exists();
    let scratch = directory.join(format!(".building-{}", uuid::Uuid::new_v4()));
    let result = build_files(&scratch, sources, progress).and_then(|files| {
        manifest::put_in_place(&scratch, directory)?;
        Ok(files)
    });
    let _ = std::fs::remove_dir_all(&scratch);
    if result.is_err() && !existed {
        // Only when it is empty: nothing of others is removed.
        let _ = std::fs::remove_dir(directory);
    }
    result
}

fn build_files(
    directory: &Path,
    sources: &Sources,
    progress: &mut dyn FnMut(Progress),
) -> Result<TemplateFiles, BuildError> {
    std::fs::create_dir_all(directory).map_err(failed("create", directory))?;
    let kernel = packages::kernel(sources, progress)?;
    let busybox = packages::busybox(sources, progress)?;

    let image = std::fs::read(&kernel.image).map_err(failed("read", &kernel.image))?;
    write(&directory.join(manifest::KERNEL), &image)?;
    let initrd = initrd::make(&kernel, &busybox, progress)?;
    write(&directory.join(manifest::INITRD), &initrd)?;

    let detail = "making a blank disk".into();
    progress(Progress {
        step: Step::Disk,
        detail,
        bytes_done: 0,
        bytes_total: 0,
    });
    Run::new("qemu-img", Duration::from_secs(60))
        .arg("create")
        .arg("-q")
        .arg("-f")
        .arg("qcow2")
        .arg(directory.join(manifest::DISK))
        .arg(DISK_BYTES.to_string())
        .output()
        .map_err(BuildError::Disk)?;
    manifest::write(directory, &kernel.release, progress)
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), BuildError> {
    std::fs::write(path, bytes).map_err(failed("write", path))
}

/// Names the file in an error of the system.
fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BuildError {
    let path = path.to_path_buf();
    move |source| BuildError::File { doing, path, source }
}
