//! Volumes of a pool: one VM's disk each, thin, blank or a copy-on-write overlay over a blob.

use crate::pool::{Pool, PoolError, VOLUMES, blob_name};
use crate::process::{Limits, Run, RunError};
use crate::qcow2;
use crate::vet::{Refusal, VIRTUAL_BYTES_MAX};
use model::VolumeId;
use model::storage::{Digest, Format};
use rustix::fs::{self, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

const SECTOR: u64 = 512;
const CREATE_DEADLINE: Duration = Duration::from_secs(60);
/// An empty overlay is a few hundred KiB even for the largest size.
const CREATE_LIMITS: Limits = Limits {
    address_space_bytes: 2 << 30,
    cpu_s: 30,
    file_bytes: 256 << 20,
};

/// What an overlay stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// The blob.
    pub digest: Digest,
    /// Its recorded format.
    pub format: Format,
}

/// A volume to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeRequest {
    /// Its id, which makes its file's name.
    pub id: VolumeId,
    /// Its format, to be recorded and passed on for ever.
    pub format: Format,
    /// Size that the guest sees, in bytes: a multiple of 512.
    pub size_bytes: u64,
    /// The blob under it; `None` is blank.
    pub base: Option<Base>,
}

/// A volume's descriptors.
#[derive(Debug)]
pub struct OpenVolume {
    /// To read and write.
    pub write: OwnedFd,
    /// To read alone.
    pub read: OwnedFd,
}

/// How large a volume is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeUsage {
    /// Size that the guest sees, in bytes.
    pub size_bytes: u64,
    /// What it takes on the disk, in bytes.
    pub allocated_bytes: u64,
}

/// Why a volume was not made or not found as it should be.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The size cannot be.
    #[error(
        "a volume of {size_bytes} bytes cannot be made; the size must be a multiple of 512, from 512 to {VIRTUAL_BYTES_MAX}"
    )]
    Size {
        /// What was asked.
        size_bytes: u64,
    },
    /// Only qcow2 has overlays.
    #[error("a raw volume cannot stand on a base; ask for format qcow2")]
    RawOverlay,
    /// The base is not in this pool.
    #[error("the base {base} is not in pool {pool}; fetch it there first")]
    NoBase {
        /// The blob's digest.
        base: Digest,
        /// The pool's directory.
        pool: PathBuf,
    },
    /// The base is not an image of the recorded format.
    #[error("the base {base} is no good {}", format.as_str())]
    BadBase {
        /// The blob's digest.
        base: Digest,
        /// Its recorded format.
        format: Format,
        /// What is wrong with it.
        #[source]
        source: Refusal,
    },
    /// The base is larger than the volume.
    #[error("the volume's {size_bytes} bytes are fewer than its base's {base_bytes}; ask for at least those")]
    Smaller {
        /// What was asked.
        size_bytes: u64,
        /// The base's virtual size.
        base_bytes: u64,
    },
    /// A volume of this id is there already and is another one.
    #[error("volume {id} exists with {found}; delete it first, or use another id")]
    Different {
        /// Its id.
        id: VolumeId,
        /// How it differs.
        found: String,
    },
    /// It cannot be read past the host's cache.
    #[error(
        "volume {id} cannot be opened without the host's cache: the file system of pool {pool} has no O_DIRECT, and a VM on it could not \
         be moved safely; use another file system"
    )]
    NoDirect {
        /// Its id.
        id: VolumeId,
        /// The pool's directory.
        pool: PathBuf,
    },
    /// The volume is not there.
    #[error("volume {id} is not in pool {pool}")]
    Absent {
        /// Its id.
        id: VolumeId,
        /// The pool's directory.
        pool: PathBuf,
    },
    /// The volume's file is not of the recorded format.
    #[error("the file of volume {id} is damaged")]
    Damaged {
        /// Its id.
        id: VolumeId,
        /// What is wrong with it.
        #[source]
        source: Refusal,
    },
    /// qemu-img did not make it.
    #[error("cannot make volume {id}")]
    Create {
        /// Its id.
        id: VolumeId,
        /// What qemu-img said.
        #[source]
        source: RunError,
    },
    /// The pool's own files failed.
    #[error(transparent)]
    Pool(#[from] PoolError),
}

impl Pool {
    /// Where the volume is; it may be absent. For people and for tests: who opens it by this follows links.
    pub fn volume_path(&self, id: VolumeId, format: Format) -> PathBuf {
        self.path().join(volume_name(id, format))
    }

    /// Makes a volume, thin, 0600. One that is there already with the same size and base is left as it is.
    ///
    /// # Errors
    /// See [`VolumeError`]. Nothing is left of a volume that was not made.
    pub fn create_volume(&self, request: &VolumeRequest) -> Result<(), VolumeError> {
        let VolumeRequest {
            id,
            format,
            size_bytes,
            base,
        } = *request;
        if size_bytes == 0 || size_bytes > VIRTUAL_BYTES_MAX || !size_bytes.is_multiple_of(SECTOR) {
            return Err(VolumeError::Size { size_bytes });
        }
        if format == Format::Raw && base.is_some() {
            return Err(VolumeError::RawOverlay);
        }
        if let Some(file) = self.open_if_there(&volume_name(id, format))? {
            return existing(request, File::from(file));
        }
        if let Some(base) = base {
            self.check_base(base, size_bytes)?;
        }
        let incoming = self.incoming(0)?;
        match format {
            Format::Raw => fs::ftruncate(incoming.file(), size_bytes)
                .map_err(|e| self.error("size", &volume_name(id, format), e))?,
            Format::Qcow2 => {
                let mut run = Run::new("qemu-img", CREATE_DEADLINE).limits(CREATE_LIMITS);
                run = run.arg("create").arg("-q").arg("-f").arg("qcow2");
                if let Some(base) = base {
                    // Unopened (-u): we have looked at the base ourselves.
                    run = run
                        .arg("-u")
                        .arg("-F")
                        .arg(base.format.as_str())
                        .arg("-b")
                        .arg(backing_name(base.digest));
                }
                let made = run.arg(incoming.path()).arg(size_bytes.to_string()).output();
                made.map_err(|source| VolumeError::Create { id, source })?;
            }
        }
        incoming.keep(VOLUMES, &file_name(id, format), Mode::RUSR | Mode::WUSR)?;
        Ok(())
    }

    /// Removes a volume; false when it was not there.
    ///
    /// # Errors
    /// See [`PoolError`].
    pub fn delete_volume(&self, id: VolumeId, format: Format) -> Result<bool, PoolError> {
        self.delete(VOLUMES, &file_name(id, format))
    }

    /// How large a volume is.
    ///
    /// # Errors
    /// See [`VolumeError`].
    pub fn volume_usage(&self, id: VolumeId, format: Format) -> Result<VolumeUsage, VolumeError> {
        let name = volume_name(id, format);
        let file = self.volume_file(id, format)?;
        let data = fs::fstat(&file).map_err(|e| self.error("read", &name, e))?;
        let size_bytes = match format {
            Format::Raw => data.st_size as u64,
            Format::Qcow2 => {
                let header = qcow2::Header::read(&file).map_err(|source| VolumeError::Damaged { id, source })?;
                header.virtual_bytes
            }
        };
        Ok(VolumeUsage {
            size_bytes,
            allocated_bytes: data.st_blocks as u64 * SECTOR,
        })
    }

    /// Gives the volume to the user that its VM's QEMU runs as, and to nobody else (0600).
    ///
    /// # Errors
    /// See [`VolumeError`].
    pub fn give_volume(&self, id: VolumeId, format: Format, user: u32, group: u32) -> Result<(), VolumeError> {
        let name = volume_name(id, format);
        let file = self.volume_file(id, format)?;
        fs::fchmod(&file, Mode::RUSR | Mode::WUSR).map_err(|e| self.error("set the mode of", &name, e))?;
        let (user, group) = (Uid::from_raw(user), Gid::from_raw(group));
        fs::fchown(&file, Some(user), Some(group)).map_err(|e| self.error("change the owner of", &name, e))?;
        Ok(())
    }

    /// Opens a volume as its VM's QEMU gets it: past the host's cache, since another host reads it after a move. Whatever lies under its
    /// name but a file of our own is refused: on a shared pool another host can put a link there at any time.
    ///
    /// # Errors
    /// See [`VolumeError`].
    pub fn open_volume(&self, id: VolumeId, format: Format) -> Result<OpenVolume, VolumeError> {
        let name = volume_name(id, format);
        let open = |flags: OFlags| match self.open_beneath(&name, flags | OFlags::DIRECT | OFlags::NONBLOCK) {
            Err(error) if error.source.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                let pool = self.path().into();
                Err(VolumeError::NoDirect { id, pool })
            }
            Err(error) if error.source.kind() == std::io::ErrorKind::NotFound => {
                let pool = self.path().into();
                Err(VolumeError::Absent { id, pool })
            }
            other => Ok(self.regular(&name, other?)?),
        };
        Ok(OpenVolume {
            write: open(OFlags::RDWR)?,
            read: open(OFlags::RDONLY)?,
        })
    }

    fn volume_file(&self, id: VolumeId, format: Format) -> Result<File, VolumeError> {
        let file = self.open_if_there(&volume_name(id, format))?;
        file.map(File::from).ok_or_else(|| VolumeError::Absent {
            id,
            pool: self.path().into(),
        })
    }

    /// The base is here, is what it was recorded as, and is not larger than the volume.
    fn check_base(&self, base: Base, size_bytes: u64) -> Result<(), VolumeError> {
        let file = self.open_if_there(&blob_name(base.digest))?.map(File::from);
        let file = file.ok_or_else(|| VolumeError::NoBase {
            base: base.digest,
            pool: self.path().into(),
        })?;
        let base_bytes = match base.format {
            Format::Raw => {
                fs::fstat(&file)
                    .map_err(|e| self.error("read", &blob_name(base.digest), e))?
                    .st_size as u64
            }
            Format::Qcow2 => {
                let header = qcow2::Header::read(&file).and_then(qcow2::Header::self_contained);
                let bad = |source| VolumeError::BadBase {
                    base: base.digest,
                    format: base.format,
                    source,
                };
                header.map_err(bad)?.virtual_bytes
            }
        };
        if base_bytes > size_bytes {
            return Err(VolumeError::Smaller { size_bytes, base_bytes });
        }
        Ok(())
    }
}

/// A second request for a volume that exists: fine when it asks for the same.
fn existing(request: &VolumeRequest, file: File) -> Result<(), VolumeError> {
    let id = request.id;
    let (size_bytes, backing) = match request.format {
        Format::Raw => (file.metadata().map_or(0, |data| data.len()), None),
        Format::Qcow2 => {
            let damaged = |source| VolumeError::Damaged { id, source };
            let header = qcow2::Header::read(&file).map_err(damaged)?;
            (header.virtual_bytes, header.backing_name(&file).map_err(damaged)?)
        }
    };
    if backing != request.base.map(|base| backing_name(base.digest)) {
        let found = backing.map_or("no base".into(), |name| format!("the base {}", name.escape_debug()));
        return Err(VolumeError::Different { id, found });
    }
    if size_bytes != request.size_bytes {
        return Err(VolumeError::Different {
            id,
            found: format!("{size_bytes} bytes"),
        });
    }
    Ok(())
}

/// How an overlay names its base: from its own directory, so that the pool may be mounted anywhere.
fn backing_name(digest: Digest) -> String {
    format!("../{}", blob_name(digest))
}

fn file_name(id: VolumeId, format: Format) -> String {
    format!("{id}.{}", format.as_str())
}

fn volume_name(id: VolumeId, format: Format) -> String {
    format!("{VOLUMES}/{}", file_name(id, format))
}
