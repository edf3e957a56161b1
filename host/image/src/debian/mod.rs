//! The Debian template: a server that boots by BIOS and by UEFI, and takes its name, address and keys from a NoCloud seed.
//!
//! ```text
//!   apt's sources ─> mmdebstrap ─> root.tar ─> root/ ─> mke2fs -d ─┐
//!                                              GRUB ─> GPT, ESP ───┴─> disk.raw ─> vet ─> disk.qcow2, manifest.json
//! ```
//!
//! Nothing is mounted and no loop device is used. Without root everything happens in a user namespace. The image has no
//! password, host key or machine id: those are made at each VM's first start.

mod disk;
mod gpt;
mod grub;
mod manifest;
mod root;
mod scratch;
mod sources;

pub use manifest::DebianFiles;

use crate::process::{Run, RunError};
use crate::vet::Refusal;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The disk's size as a guest sees it: thin, so what is not used costs nothing. A VM with a larger disk grows into it.
pub const DISK_BYTES: u64 = 8 << 30;
/// What a build needs of free space at its fullest: archive and tree at once, about 0.9 GiB measured, and room.
const SCRATCH_BYTES_MIN: u64 = 1536 << 20;

/// A release of Debian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Suite {
    /// Debian 12.
    #[default]
    Bookworm,
    /// Debian 13.
    Trixie,
}

impl Suite {
    /// Its code name, as in apt's sources.
    pub const fn codename(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
        }
    }
}

/// What to build, and from where.
#[derive(Clone, Debug)]
pub struct Sources {
    /// The release.
    pub suite: Suite,
    /// The archive to take packages from; without it, those of this machine's apt.
    pub mirror: Option<String>,
    /// Keeps downloaded packages from one build to the next; made when absent.
    pub cache: PathBuf,
}

/// A step of the build, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Looking for what is needed.
    Prepare,
    /// Downloading and installing packages into a tree.
    Packages,
    /// Making file systems, partitions and boot loaders.
    Disk,
    /// Packing the disk as qcow2.
    Pack,
    /// Vetting and hashing the result.
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
    /// Bytes of the step in all; 0 when not known.
    pub bytes_total: u64,
}

impl Progress {
    fn of(step: Step, detail: impl Into<String>) -> Self {
        Progress {
            step,
            detail: detail.into(),
            bytes_done: 0,
            bytes_total: 0,
        }
    }
}

/// Why the template was not built. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Programs are missing.
    #[error(
        "building Debian needs {what}, which this machine lacks; install: apt-get install --no-install-recommends {packages}"
    )]
    Missing {
        /// The programs and files.
        what: String,
        /// The packages that have them.
        packages: String,
    },
    /// apt has no archive of Debian's.
    #[error("apt on this machine knows no archive of Debian's; run `apt-get update`, or name one with --mirror URL")]
    NoArchive,
    /// A mirror that is no address.
    #[error("{0:?} is no mirror's address, such as http://mirror.example/debian")]
    Mirror(String),
    /// Too little space.
    #[error(
        "{path} has {free_mib} MiB free and a build needs {} for a while; free some, or set TMPDIR to a directory with more",
        SCRATCH_BYTES_MIN >> 20
    )]
    Space {
        /// Where.
        path: PathBuf,
        /// What there is.
        free_mib: u64,
    },
    /// mmdebstrap failed.
    #[error("the packages could not be installed; check that this machine reaches apt's sources (`apt-get update`)")]
    Packages(#[source] RunError),
    /// Another program failed.
    #[error("cannot {doing}")]
    Program {
        /// What it was to do.
        doing: &'static str,
        /// What it said.
        #[source]
        source: RunError,
    },
    /// GRUB's parts are not built as expected, or too large for their partition.
    #[error("{path} is not what GRUB 2 makes; install Debian's grub-pc-bin and grub-common of one version")]
    Grub {
        /// The part.
        path: PathBuf,
    },
    /// The packages were installed, and there is no kernel among them.
    #[error("the packages brought no kernel to boot; the archive is not complete, try another with --mirror URL")]
    NoKernel,
    /// Our own vetting refuses the result.
    #[error("the disk that was built is not sound")]
    Vet(#[from] Refusal),
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

impl BuildError {
    fn program(doing: &'static str) -> impl FnOnce(RunError) -> Self {
        move |source| Self::Program { doing, source }
    }
}

/// Builds the template's disk in `directory` (created when absent) and describes it in `directory/manifest.json`.
///
/// Takes some 40 s of processor time, and needs the network for what the cache lacks. With `SOURCE_DATE_EPOCH` set, the
/// packages' own times are cut at it.
///
/// # Errors
/// See [`BuildError`]. What was in `directory` before stays then.
pub fn build(
    directory: &Path,
    sources: &Sources,
    progress: &mut dyn FnMut(Progress),
) -> Result<DebianFiles, BuildError> {
    progress(Progress::of(Step::Prepare, "looking for the tools"));
    missing()?;
    let lines = sources::lines(sources.suite, sources.mirror.as_deref())?;
    std::fs::create_dir_all(directory).map_err(failed("create", directory))?;
    let cache = root::Cache::open(&sources.cache.join(sources.suite.codename()), progress)?;
    let scratch = scratch::Scratch::new(&std::env::temp_dir(), SCRATCH_BYTES_MIN)?;
    let tree = root::make(scratch.path(), sources.suite, &lines, &cache, progress)?;
    let raw = disk::assemble(scratch.path(), &tree, progress)?;
    manifest::pack(directory, &raw, sources.suite, &tree, progress)
}

/// What the build runs, and the packages that have it.
const TOOLS: [(&str, &str); 8] = [
    ("mmdebstrap", "mmdebstrap"),
    ("apt-get", "apt"),
    ("tar", "tar"),
    ("mke2fs", "e2fsprogs"),
    ("mformat", "mtools"),
    ("grub-mkimage", "grub-common"),
    ("qemu-img", "qemu-utils"),
    ("timeout", "coreutils"),
];
/// Files that it reads, and the packages that have them.
const PARTS: [(&str, &str); 2] = [
    ("/usr/lib/grub/i386-pc/boot.img", "grub-pc-bin"),
    ("/usr/lib/grub/x86_64-efi/normal.mod", "grub-efi-amd64-bin"),
];

fn missing() -> Result<(), BuildError> {
    let tools = TOOLS.iter().filter(|(tool, _)| found(tool).is_none());
    let parts = PARTS.iter().filter(|(part, _)| !Path::new(part).exists());
    let lacking: Vec<_> = tools.chain(parts).collect();
    if lacking.is_empty() {
        return Ok(());
    }
    let what: Vec<&str> = lacking.iter().map(|(what, _)| *what).collect();
    let packages: Vec<&str> = lacking.iter().map(|(_, package)| *package).collect();
    Err(BuildError::Missing {
        what: what.join(", "),
        packages: packages.join(" "),
    })
}

/// A program in `PATH`, or where an ordinary user's `PATH` does not lead on Debian.
fn found(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(tool))
        .find(|file| file.is_file())
}

/// A run of `tool` as root: ours, or that of a user namespace of ours, where files keep the owners they have in the guest.
fn as_root(tool: &str, deadline: Duration) -> Run {
    let program = found(tool).map_or_else(|| OsString::from(tool), PathBuf::into_os_string);
    if rustix::process::geteuid().is_root() {
        return Run::new(&program.to_string_lossy(), deadline);
    }
    Run::new("unshare", deadline)
        .arg("--user")
        .arg("--map-root-user")
        .arg("--map-auto")
        .arg("--")
        .arg(program)
}

/// Names the file in an error of the system.
fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BuildError {
    let path = path.to_path_buf();
    move |source| BuildError::File { doing, path, source }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), BuildError> {
    std::fs::write(path, bytes).map_err(failed("write", path))
}
