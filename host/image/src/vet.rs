//! Judges a stranger's disk image before any other program opens it.

use crate::qcow2;
use model::storage::Format;
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The largest disk that a guest may see: 64 TiB.
pub const VIRTUAL_BYTES_MAX: u64 = 64 << 40;
const SECTOR: u64 = 512;
/// ISO 9660's signature is in the sector after the first 32 KiB.
const ISO_AT: u64 = 32769;
const ISO: &[u8] = b"CD001";

/// The signatures of other formats: where, what, whose. A raw image that has one is refused, because a program that probes
/// would read it as that format, other files' names included.
const SIGNATURES: [(u64, &[u8], &str); 13] = [
    (0, &qcow2::MAGIC, "qcow2"),
    (0, b"QED\0", "QED"),
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (0, b"vhdxfile", "VHDX"),
    (0, b"conectix", "VHD"),
    (0, b"LUKS\xba\xbe", "LUKS"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0, b"WithouFreSpacExt", "Parallels"),
    (0, b"Bochs Virtual HD Image", "Bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format", "cloop"),
    (0x40, b"\x7f\x10\xda\xbe", "VDI"),
];

/// What a sound image says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    /// Its format: the one that was declared.
    pub format: Format,
    /// Size that a guest would see, in bytes.
    pub virtual_bytes: u64,
    /// Size of the file, in bytes.
    pub file_bytes: u64,
}

/// Why an image is not let in. Each message says what is wrong and what would be right.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The file cannot be read.
    #[error("the image cannot be read")]
    Unreadable(#[source] io::Error),
    /// A directory, device, symbolic link...
    #[error("the image is not a regular file; give the file itself")]
    NotAFile,
    /// No bytes.
    #[error("the image is empty; give a disk image")]
    Empty,
    /// The file ends too early.
    #[error("the image is cut off: it has {file_bytes} bytes and refers to {needed_bytes}; copy it again")]
    Truncated {
        /// How long it would have to be at least.
        needed_bytes: u64,
        /// How long it is.
        file_bytes: u64,
    },
    /// Declared qcow2, but is none.
    #[error("the image is declared qcow2 but does not begin as one; declare its real format")]
    NotQcow2,
    /// Declared one format, looks like another.
    #[error(
        "the image is declared {declared} but looks like {found}; declare that, or convert it with `qemu-img convert`"
    )]
    Polyglot {
        /// What was declared.
        declared: &'static str,
        /// What it looks like.
        found: &'static str,
    },
    /// A raw image that is not whole sectors.
    #[error("a raw image of {file_bytes} bytes is not whole sectors of 512; copy it again, or pad it")]
    PartSector {
        /// How long it is.
        file_bytes: u64,
    },
    /// It needs another file under it.
    #[error("the image has a backing file; make it self-contained with `qemu-img convert`")]
    BackingFile,
    /// Its data is in another file.
    #[error("the image keeps its data in another file; make it self-contained with `qemu-img convert`")]
    DataFile,
    /// It is encrypted.
    #[error("the image is encrypted; decrypt it with `qemu-img convert`")]
    Encrypted,
    /// It was not closed, or is marked corrupt.
    #[error("the image was not closed properly or is marked corrupt; repair it with `qemu-img check -r all`")]
    NotClean,
    /// It has features that we do not know.
    #[error("the image needs unknown features (bits {bits:#x}); convert it with `qemu-img convert -O qcow2`")]
    UnknownFeatures {
        /// The unknown incompatible feature bits.
        bits: u64,
    },
    /// The disk would be too large, or of no size.
    #[error("the image's virtual size is {bytes} bytes; from 1 to {limit} are allowed")]
    VirtualSize {
        /// What it says.
        bytes: u64,
        /// What is allowed.
        limit: u64,
    },
    /// A field of the header or an entry of a table is not sound.
    #[error("the image's {field} is wrong: {problem}; make it anew with `qemu-img convert -O qcow2`")]
    Field {
        /// The field's name in the format's specification.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

/// Judges the image at `path`, which must be what it is declared to be and stand alone.
///
/// The file must be one that nobody else can write: what is judged here is opened by others afterwards. A symbolic link is
/// not followed. Reads the header and, of qcow2, all mapping tables; never the data.
///
/// # Errors
/// See [`Refusal`].
pub fn vet(path: &Path, declared: Format) -> Result<ImageInfo, Refusal> {
    // Not blocking: a named pipe would otherwise wait for a writer.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(rustix::io::Errno::LOOP) => return Err(Refusal::NotAFile),
        Err(error) => return Err(Refusal::Unreadable(error.into())),
    };
    let data = file.metadata().map_err(Refusal::Unreadable)?;
    if !data.is_file() {
        return Err(Refusal::NotAFile);
    }
    if data.len() == 0 {
        return Err(Refusal::Empty);
    }
    let virtual_bytes = match declared {
        Format::Qcow2 => vet_qcow2(&file)?,
        Format::Raw => vet_raw(&file, data.len())?,
    };
    Ok(ImageInfo {
        format: declared,
        virtual_bytes,
        file_bytes: data.len(),
    })
}

fn vet_qcow2(file: &File) -> Result<u64, Refusal> {
    let header = match qcow2::Header::read(file) {
        Err(Refusal::NotQcow2) => {
            let found = look(file)?;
            return Err(found.map_or(Refusal::NotQcow2, |found| Refusal::Polyglot {
                declared: "qcow2",
                found,
            }));
        }
        header => header?.self_contained()?,
    };
    // With clusters this large the place belongs to the header: no guest's data can put the signature there.
    if 1 << header.cluster_bits > ISO_AT && has(file, ISO_AT, ISO)? {
        return Err(Refusal::Polyglot {
            declared: "qcow2",
            found: "ISO 9660",
        });
    }
    header.check_tables(file)?;
    Ok(header.virtual_bytes)
}

fn vet_raw(file: &File, file_bytes: u64) -> Result<u64, Refusal> {
    if let Some(found) = look(file)? {
        return Err(Refusal::Polyglot { declared: "raw", found });
    }
    if !file_bytes.is_multiple_of(SECTOR) {
        return Err(Refusal::PartSector { file_bytes });
    }
    if file_bytes > VIRTUAL_BYTES_MAX {
        return Err(Refusal::VirtualSize {
            bytes: file_bytes,
            limit: VIRTUAL_BYTES_MAX,
        });
    }
    Ok(file_bytes)
}

/// The format whose signature the file has.
fn look(file: &File) -> Result<Option<&'static str>, Refusal> {
    for (at, signature, format) in SIGNATURES {
        if has(file, at, signature)? {
            return Ok(Some(format));
        }
    }
    Ok(None)
}

fn has(file: &File, at: u64, signature: &[u8]) -> Result<bool, Refusal> {
    let mut bytes = vec![0; signature.len()];
    match file.read_exact_at(&mut bytes, at) {
        Ok(()) => Ok(bytes == signature),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(Refusal::Unreadable(error)),
    }
}
