//! What a template directory holds: `manifest.json`, with the size and digest of each file.

use super::{BASE_COMMAND_LINE, BuildError, DISK_BYTES, Progress, Step, failed};
use crate::pool::{Pool, PoolError, ReceiveError};
use model::storage::{Digest, Format};
use model::template::{Blob, Boot, Content, Disk, Seed};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

pub(crate) const KERNEL: &str = "vmlinuz";
pub(crate) const INITRD: &str = "initrd.cpio";
pub(crate) const DISK: &str = "disk.qcow2";
pub(crate) const MANIFEST: &str = "manifest.json";
const VERSION: u32 = 1;
const MANIFEST_BYTES_MAX: u64 = 64 << 10;

/// One file of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    /// Its name in the template's directory.
    pub file: String,
    /// Its size.
    pub size_bytes: u64,
    /// Its digest.
    pub sha256: Digest,
}

impl Artifact {
    /// The file as a blob of a pool.
    pub fn blob(&self) -> Blob {
        Blob {
            digest: self.sha256,
            size_bytes: self.size_bytes,
        }
    }
}

/// A template as files: what boots, how, and the disk that overlays are made over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateFiles {
    /// The form of this description; 1.
    pub version: u32,
    /// The template's name.
    pub name: String,
    /// The kernel's release, as `uname -r` says in the guest.
    pub kernel_release: String,
    /// The kernel image, for QEMU's `-kernel`.
    pub kernel: Artifact,
    /// The initramfs, for `-initrd`.
    pub initrd: Artifact,
    /// The base of `-append`; the guest's own `godwit.*` words come after it.
    pub command_line: String,
    /// The base disk.
    pub disk: Artifact,
    /// The base disk's format, always passed on and never probed.
    pub disk_format: Format,
    /// The base disk's size as the guest sees it.
    pub disk_size_bytes: u64,
    /// The least memory the guest boots with, in MiB.
    pub memory_mib_min: u64,
}

/// Why a manifest was refused.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// A file could not be read.
    #[error("cannot read {path}; build the template again")]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The manifest is not in the form this program writes.
    #[error("{path} is not a template's manifest; build the template again")]
    Form {
        /// Which file.
        path: PathBuf,
        /// What the parser said.
        #[source]
        source: serde_json::Error,
    },
    /// The manifest is of another version or names files elsewhere.
    #[error("{path}: {reason}; build the template again")]
    Content {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl TemplateFiles {
    /// Reads and checks `directory/manifest.json`.
    ///
    /// # Errors
    /// See [`ManifestError`]: absent, malformed, of another version, or with a path for a name.
    pub fn load(directory: &Path) -> Result<Self, ManifestError> {
        let path = directory.join(MANIFEST);
        let mut text = Vec::new();
        let opened = File::open(&path).and_then(|file| file.take(MANIFEST_BYTES_MAX).read_to_end(&mut text));
        opened.map_err(|source| ManifestError::Read {
            path: path.clone(),
            source,
        })?;
        let files: TemplateFiles = serde_json::from_slice(&text).map_err(|source| ManifestError::Form {
            path: path.clone(),
            source,
        })?;
        if files.version != VERSION {
            let reason = format!("it is of version {}, this program reads {VERSION}", files.version);
            return Err(ManifestError::Content { path, reason });
        }
        for artifact in files.artifacts() {
            if Path::new(&artifact.file).file_name() != Some(artifact.file.as_ref()) {
                return Err(ManifestError::Content {
                    path,
                    reason: "it names a file outside its directory".into(),
                });
            }
        }
        Ok(files)
    }

    /// Reads every file again and compares size and digest.
    ///
    /// # Errors
    /// See [`ManifestError`]; the first file that differs is named.
    pub fn verify(&self, directory: &Path) -> Result<(), ManifestError> {
        for artifact in self.artifacts() {
            let path = directory.join(&artifact.file);
            let found = digest(&path).map_err(|source| ManifestError::Read {
                path: path.clone(),
                source,
            })?;
            if found != (artifact.size_bytes, artifact.sha256) {
                return Err(ManifestError::Content {
                    path,
                    reason: "the file is not the one that was built".into(),
                });
            }
        }
        Ok(())
    }

    /// The template's content once its files are blobs of a pool.
    pub fn content(&self) -> Content {
        let boot = Boot::Direct {
            kernel: self.kernel.blob(),
            initrd: self.initrd.blob(),
            cmdline: self.command_line.clone(),
        };
        let disk = Disk {
            blob: self.disk.blob(),
            format: self.disk_format,
            size_bytes: self.disk_size_bytes,
        };
        Content {
            boot,
            disk: Some(disk),
            memory_mib_min: self.memory_mib_min,
            seed: Seed::None,
        }
    }

    /// Puts the template's files into a pool as blobs; those that are there already are not read.
    ///
    /// # Errors
    /// See [`ReceiveError`]: a file that is not the one that was built is refused by its digest.
    pub fn store(&self, directory: &Path, pool: &Pool) -> Result<(), ReceiveError> {
        for artifact in self.artifacts() {
            let path = directory.join(&artifact.file);
            let mut file = File::open(&path).map_err(|source| PoolError {
                doing: "open",
                path,
                source,
            })?;
            pool.receive_blob(artifact.blob(), &mut file)?;
        }
        Ok(())
    }

    /// The kernel, the initramfs, the disk.
    pub fn artifacts(&self) -> [&Artifact; 3] {
        [&self.kernel, &self.initrd, &self.disk]
    }
}

/// Hashes the files that the build made and writes the manifest.
pub(crate) fn write(
    directory: &Path,
    kernel_release: &str,
    progress: &mut dyn FnMut(Progress),
) -> Result<TemplateFiles, BuildError> {
    let size = |name: &str| std::fs::metadata(directory.join(name)).map_or(0, |data| data.len());
    let bytes_total = [KERNEL, INITRD, DISK].into_iter().map(size).sum();
    let mut bytes_done = 0;
    let mut artifact = |file: &str| -> Result<Artifact, BuildError> {
        progress(Progress {
            step: Step::Manifest,
            detail: format!("hashing {file}"),
            bytes_done,
            bytes_total,
        });
        let path = directory.join(file);
        let (size_bytes, sha256) = digest(&path).map_err(failed("read", &path))?;
        bytes_done += size_bytes;
        Ok(Artifact {
            file: file.into(),
            size_bytes,
            sha256,
        })
    };
    let files = TemplateFiles {
        version: VERSION,
        name: "micro".into(),
        kernel_release: kernel_release.into(),
        kernel: artifact(KERNEL)?,
        initrd: artifact(INITRD)?,
        command_line: BASE_COMMAND_LINE.into(),
        disk: artifact(DISK)?,
        disk_format: Format::Qcow2,
        disk_size_bytes: DISK_BYTES,
        memory_mib_min: 128,
    };
    let path = directory.join(MANIFEST);
    let text = serde_json::to_vec_pretty(&files).map_err(|error| failed("write", &path)(error.into()))?;
    std::fs::write(&path, text).map_err(failed("write", &path))?;
    progress(Progress {
        step: Step::Manifest,
        detail: "done".into(),
        bytes_done: bytes_total,
        bytes_total,
    });
    Ok(files)
}

/// Moves a finished template's files from `scratch` to `directory`, the manifest away first and back last.
pub(crate) fn put_in_place(scratch: &Path, directory: &Path) -> Result<(), BuildError> {
    let manifest = directory.join(MANIFEST);
    match std::fs::remove_file(&manifest) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("replace", &manifest)(error)),
        _ => {}
    }
    for name in [KERNEL, INITRD, DISK, MANIFEST] {
        let path = directory.join(name);
        std::fs::rename(scratch.join(name), &path).map_err(failed("write", &path))?;
    }
    Ok(())
}

/// Size and SHA-256 of a file.
pub(crate) fn digest(path: &Path) -> io::Result<(u64, Digest)> {
    let mut hash = Sha256::new();
    let bytes = io::copy(&mut File::open(path)?, &mut hash)?;
    Ok((bytes, Digest(hash.finalize().into())))
}
