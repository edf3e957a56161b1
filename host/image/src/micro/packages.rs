//! Finds a kernel and a busybox: given, unpacked earlier, installed, or fetched as a package and unpacked into the cache.
//!
//! Nothing is installed: `apt-get download` needs no rights, and `dpkg-deb -x` only unpacks. Downloaded bytes are checked by
//! apt against its signed index.

use super::{Progress, Sources, Step};
use crate::process::{Run, RunError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

const FETCH_DEADLINE: Duration = Duration::from_secs(600);
const QUERY_DEADLINE: Duration = Duration::from_secs(60);
/// Packages that depend on the newest kernel, the smallest first: Debian's cloud kernel, Ubuntu's, any.
const KERNEL_PACKAGES: [&str; 4] = [
    "linux-image-cloud-amd64",
    "linux-image-virtual",
    "linux-image-amd64",
    "linux-image-generic",
];

/// A kernel to build with.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    /// The bootable image.
    pub(crate) image: PathBuf,
    /// `/lib/modules/RELEASE` or the like.
    pub(crate) modules: PathBuf,
    /// The release's name.
    pub(crate) release: String,
}

/// Why a part could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A given file is not there.
    #[error("cannot use {path} as given")]
    Given {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// No kernel is installed and apt knows none.
    #[error("no Linux kernel is installed and apt offers none of {}; run `apt-get update`, or name a kernel", KERNEL_PACKAGES.join(", "))]
    NoKernel,
    /// The kernel that was given or unpacked has no modules beside it.
    #[error("{path} is not a directory of kernel modules with a release for its name")]
    NoModules {
        /// Where they were looked for.
        path: PathBuf,
    },
    /// A package could not be downloaded.
    #[error("cannot download the package {package}; check the network and run `apt-get update`")]
    Download {
        /// Which package.
        package: String,
        /// What apt said.
        #[source]
        source: RunError,
    },
    /// A package could not be unpacked or used.
    #[error("cannot unpack or use the package {package}")]
    Unpack {
        /// Which package.
        package: String,
        /// What dpkg-deb, or the program in the package, said.
        #[source]
        source: RunError,
    },
    /// The cache directory cannot be written.
    #[error("cannot use the cache {path}")]
    Cache {
        /// Which directory or file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A kernel: given, unpacked earlier, downloaded, or, when apt offers none, installed.
///
/// # Errors
/// See [`SourceError`].
pub(crate) fn kernel(sources: &Sources, progress: &mut dyn FnMut(Progress)) -> Result<Kernel, SourceError> {
    if let Some((image, modules)) = &sources.kernel {
        return given(image, modules);
    }
    let cache = sources.cache.join("kernel");
    if let Some(kernel) = newest(&cache) {
        return Ok(kernel);
    }
    // An installed cloud kernel needs no download; other installed kernels are large and come last.
    if let Some(kernel) = newest(Path::new("/")).filter(|kernel| kernel.release.contains("cloud")) {
        return Ok(kernel);
    }
    match fetch_kernel(&sources.cache, &cache, progress) {
        Ok(()) => newest(&cache).ok_or(SourceError::NoModules {
            path: cache.join("lib/modules"),
        }),
        Err(error) => newest(Path::new("/")).ok_or(error),
    }
}

/// A static busybox: given, installed, unpacked earlier, or downloaded.
///
/// # Errors
/// See [`SourceError`].
pub(crate) fn busybox(sources: &Sources, progress: &mut dyn FnMut(Progress)) -> Result<PathBuf, SourceError> {
    if let Some(path) = &sources.busybox {
        return std::fs::metadata(path)
            .map(|_| path.clone())
            .map_err(|source| SourceError::Given {
                path: path.clone(),
                source,
            });
    }
    let cache = sources.cache.join("busybox");
    let places = ["/usr/bin/busybox", "/bin/busybox"];
    let cached = ["usr/bin/busybox", "bin/busybox"].map(|place| cache.join(place));
    let all = || places.iter().map(PathBuf::from).chain(cached.clone());
    if let Some(found) = all().find(|path| is_static(path)) {
        return Ok(found);
    }
    fetch(
        &sources.cache,
        &["busybox-static".into()],
        &cache,
        Step::Busybox,
        progress,
    )?;
    all().find(|path| is_static(path)).ok_or(SourceError::Given {
        path: cache,
        source: io::Error::new(io::ErrorKind::NotFound, "busybox-static has no static busybox"),
    })
}

fn given(image: &Path, modules: &Path) -> Result<Kernel, SourceError> {
    std::fs::metadata(image).map_err(|source| SourceError::Given {
        path: image.into(),
        source,
    })?;
    let release = modules.file_name().filter(|_| modules.join("kernel").is_dir());
    let release = release.ok_or_else(|| SourceError::NoModules { path: modules.into() })?;
    Ok(Kernel {
        image: image.into(),
        modules: modules.into(),
        release: release.to_string_lossy().into_owned(),
    })
}

/// The kernel of the highest release that has both an image and modules under `root`.
fn newest(root: &Path) -> Option<Kernel> {
    let modules = ["lib/modules", "usr/lib/modules"].map(|place| root.join(place));
    let releases = modules
        .iter()
        .filter_map(|place| std::fs::read_dir(place).ok())
        .flatten()
        .flatten();
    let kernels = releases.filter_map(|entry| {
        let release = entry.file_name().into_string().ok()?;
        let image = root.join("boot").join(format!("vmlinuz-{release}"));
        // On Ubuntu only root may read installed kernels: then they are no help.
        std::fs::File::open(&image).ok()?;
        entry.path().join("kernel").is_dir().then(|| Kernel {
            image,
            modules: entry.path(),
            release,
        })
    });
    kernels.max_by_key(|kernel| version_key(&kernel.release))
}

/// The numbers of a release in order, so that 6.12 is more than 6.1.
fn version_key(release: &str) -> Vec<u64> {
    release
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|number| number.parse().ok())
        .collect()
}

/// A program that has no dynamic loader: the initramfs has none. Looks for the loader's path in the file, as `PT_INTERP`
/// would hold it.
fn is_static(path: &Path) -> bool {
    let Ok(program) = std::fs::read(path) else { return false };
    let head = &program[..program.len().min(4096)];
    program.starts_with(b"\x7fELF") && !head.windows(8).any(|window| window == b"/ld-linu")
}

/// Downloads and unpacks the first kernel that apt offers, with its modules.
fn fetch_kernel(cache: &Path, target: &Path, progress: &mut dyn FnMut(Progress)) -> Result<(), SourceError> {
    let image = KERNEL_PACKAGES
        .iter()
        .find_map(|package| depends(package, "linux-image-"));
    let image = image.ok_or(SourceError::NoKernel)?;
    // Ubuntu keeps the modules in a package of their own.
    let modules = depends(&image, "linux-modules-");
    let packages: Vec<String> = [Some(image), modules].into_iter().flatten().collect();
    fetch(cache, &packages, target, Step::Kernel, progress)
}

/// The first dependency of `package` that begins with `prefix` and a digit.
fn depends(package: &str, prefix: &str) -> Option<String> {
    let query = Run::new("apt-cache", QUERY_DEADLINE)
        .arg("depends")
        .arg("--important")
        .arg(package);
    let answer = String::from_utf8(query.output().ok()?).ok()?;
    let names = answer.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    let mut wanted = names.filter(|name| {
        let rest = name.strip_prefix(prefix);
        rest.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    });
    wanted.next().map(String::from)
}

/// Downloads `packages` into a scratch directory in `cache`, unpacks them, and puts the result at `target` at once.
fn fetch(
    cache: &Path,
    packages: &[String],
    target: &Path,
    step: Step,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), SourceError> {
    let unusable = |path: &Path| {
        let path = path.to_path_buf();
        move |source| SourceError::Cache { path, source }
    };
    let scratch = cache.join(format!("fetching-{}", uuid::Uuid::new_v4()));
    std::fs::create_dir_all(&scratch).map_err(unusable(&scratch))?;
    let result = fetch_into(&scratch, packages, step, progress).and_then(|()| {
        // Somebody else may have been quicker: theirs is as good.
        match std::fs::rename(scratch.join("root"), target) {
            Err(_) if target.exists() => Ok(()),
            renamed => renamed.map_err(unusable(target)),
        }
    });
    let _ = std::fs::remove_dir_all(&scratch);
    result
}

fn fetch_into(
    scratch: &Path,
    packages: &[String],
    step: Step,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), SourceError> {
    let bytes_total = packages.iter().map(|package| download_bytes(package)).sum();
    let mut bytes_done = 0;
    for package in packages {
        progress(Progress {
            step,
            detail: format!("downloading {package}"),
            bytes_done,
            bytes_total,
        });
        Run::new("apt-get", FETCH_DEADLINE)
            .arg("download")
            .arg("-q")
            .arg(package)
            .directory(scratch)
            .output()
            .map_err(|source| SourceError::Download {
                package: package.clone(),
                source,
            })?;
        bytes_done += download_bytes(package);
    }
    progress(Progress {
        step,
        detail: "unpacking".into(),
        bytes_done,
        bytes_total,
    });
    let root = scratch.join("root");
    let archives = std::fs::read_dir(scratch).map_err(|source| SourceError::Cache {
        path: scratch.into(),
        source,
    })?;
    for archive in archives
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "deb"))
    {
        let package = archive.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let unpack = Run::new("dpkg-deb", FETCH_DEADLINE).arg("-x").arg(&archive).arg(&root);
        unpack
            .output()
            .map_err(|source| SourceError::Unpack { package, source })?;
    }
    Ok(())
}

/// The size of a package as apt's index has it; 0 when it does not say.
fn download_bytes(package: &str) -> u64 {
    let query = Run::new("apt-cache", QUERY_DEADLINE)
        .arg("show")
        .arg("--no-all-versions")
        .arg(package);
    let answer = query.output().unwrap_or_default();
    let text = String::from_utf8_lossy(&answer);
    text.lines()
        .find_map(|line| line.strip_prefix("Size: ")?.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_is_picked_by_its_numbers() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("boot")).unwrap();
        for release in ["6.1.0-9-cloud", "6.12.1-cloud", "6.1.0-56-cloud"] {
            std::fs::create_dir_all(root.path().join("lib/modules").join(release).join("kernel")).unwrap();
            std::fs::write(root.path().join("boot").join(format!("vmlinuz-{release}")), "x").unwrap();
        }
        assert_eq!(newest(root.path()).unwrap().release, "6.12.1-cloud");
        std::fs::remove_file(root.path().join("boot/vmlinuz-6.12.1-cloud")).unwrap();
        assert_eq!(newest(root.path()).unwrap().release, "6.1.0-56-cloud");
    }

    #[test]
    fn a_busybox_that_needs_a_loader_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("busybox");
        std::fs::write(&path, b"\x7fELF....../lib64/ld-linux-x86-64.so.2\0").unwrap();
        assert!(!is_static(&path));
        std::fs::write(&path, b"\x7fELF static").unwrap();
        assert!(is_static(&path));
    }

    #[test]
    fn a_given_kernel_without_modules_is_refused() {
        let sources = Sources {
            kernel: Some(("/bin/sh".into(), "/tmp".into())),
            ..Sources::found("/nonexistent")
        };
        assert!(matches!(
            kernel(&sources, &mut |_| ()),
            Err(SourceError::NoModules { .. })
        ));
    }
}
