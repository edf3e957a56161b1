//! Our own strict reader of qcow2 (QEMU, docs/interop/qcow2.rst): every field is bounded before it is used.
//!
//! [`parse`] judges the header from bytes alone; [`Header::check_tables`] walks the tables and finds what points outside
//! the file. Neither trusts the other's file to stay small: what is read is bounded by the file's own length.

use crate::vet::{Refusal, VIRTUAL_BYTES_MAX};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// `QFI\xfb`.
pub(crate) const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Length of a version 2 header; extensions begin there.
const V2_BYTES: usize = 72;
/// Least length of a version 3 header.
const V3_BYTES: usize = 104;
/// How much of the file's start is judged: the largest first cluster.
const HEAD_BYTES_MAX: usize = 2 << 20;
/// QEMU's own bound on the first-level table (QCOW_MAX_L1_SIZE).
const L1_BYTES_MAX: u64 = 32 << 20;
/// QEMU's own bound on the refcount table (QCOW_MAX_REFTABLE_SIZE).
const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
const SNAPSHOTS_MAX: u64 = 1024;
/// The least a snapshot's record takes.
const SNAPSHOT_BYTES_MIN: u64 = 40;
const BACKING_NAME_BYTES_MAX: u64 = 1023;
const EXTENSIONS_MAX: usize = 64;

/// Header extensions (docs/interop/qcow2.rst, "Header extensions").
const EXTENSION_END: u32 = 0;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;
const EXTENSION_ENCRYPTION: u32 = 0x0537_be77;

/// Incompatible feature bits.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// A table entry's offset: bits 9 to 55.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;

/// What a sound header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) cluster_bits: u32,
    pub(crate) virtual_bytes: u64,
    incompatible: u64,
    backing: Option<(u64, u64)>,
    l1_entries: u64,
    l1_offset: u64,
    file_bytes: u64,
}

impl Header {
    /// Reads and judges the header of an open file.
    pub(crate) fn read(file: &File) -> Result<Header, Refusal> {
        let file_bytes = file.metadata().map_err(Refusal::Unreadable)?.len();
        let mut head = vec![0; file_bytes.min(HEAD_BYTES_MAX as u64) as usize];
        file.read_exact_at(&mut head, 0).map_err(Refusal::Unreadable)?;
        parse(&head, file_bytes)
    }

    /// The header when the image needs no other file and was closed properly.
    pub(crate) fn self_contained(self) -> Result<Header, Refusal> {
        if self.backing.is_some() {
            return Err(Refusal::BackingFile);
        }
        if self.incompatible & (DIRTY | CORRUPT) != 0 {
            return Err(Refusal::NotClean);
        }
        Ok(self)
    }

    /// The backing file's name as recorded; lossy where it is not UTF-8.
    pub(crate) fn backing_name(&self, file: &File) -> Result<Option<String>, Refusal> {
        let Some((offset, length)) = self.backing else {
            return Ok(None);
        };
        let mut name = vec![0; length as usize];
        file.read_exact_at(&mut name, offset).map_err(Refusal::Unreadable)?;
        Ok(Some(String::from_utf8_lossy(&name).into_owned()))
    }

    fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Walks both levels of the active mapping: every table lies in the file, no two first-level entries share one (so the
    /// walk is no longer than the file), and no cluster begins past the file's end.
    pub(crate) fn check_tables(&self, file: &File) -> Result<(), Refusal> {
        let mut l1 = vec![0; self.l1_entries as usize * 8];
        file.read_exact_at(&mut l1, self.l1_offset)
            .map_err(Refusal::Unreadable)?;
        let mut tables: Vec<u64> = words(&l1)
            .map(|entry| entry & OFFSET_MASK)
            .filter(|&offset| offset != 0)
            .collect();
        tables.sort_unstable();
        if tables.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(Refusal::Field {
                field: "L1 table",
                problem: "two entries share one L2 table".into(),
            });
        }
        let mut table = vec![0; self.cluster_bytes() as usize];
        for offset in tables {
            within(
                "L2 table",
                offset,
                self.cluster_bytes(),
                self.cluster_bytes(),
                self.file_bytes,
            )?;
            file.read_exact_at(&mut table, offset).map_err(Refusal::Unreadable)?;
            self.check_l2(&table)?;
        }
        Ok(())
    }

    fn check_l2(&self, table: &[u8]) -> Result<(), Refusal> {
        let step = if self.incompatible & EXTENDED_L2 != 0 { 2 } else { 1 };
        for entry in words(table).step_by(step) {
            let (offset, aligned) = if entry & COMPRESSED != 0 {
                // The offset takes the low bits, the sector count those above.
                (entry & ((1 << (62 - (self.cluster_bits - 8))) - 1), true)
            } else {
                let offset = entry & OFFSET_MASK;
                (offset, offset.is_multiple_of(self.cluster_bytes()))
            };
            if !aligned {
                return Err(Refusal::Field {
                    field: "L2 table",
                    problem: format!("the offset {offset} is not aligned"),
                });
            }
            if offset >= self.file_bytes {
                return Err(Refusal::Truncated {
                    needed_bytes: offset.saturating_add(1),
                    file_bytes: self.file_bytes,
                });
            }
        }
        Ok(())
    }
}

/// Judges the first bytes (all, or the first 2 MiB) of a file of `file_bytes` bytes.
pub(crate) fn parse(head: &[u8], file_bytes: u64) -> Result<Header, Refusal> {
    if head.len() < V2_BYTES {
        return Err(Refusal::Truncated {
            needed_bytes: V2_BYTES as u64,
            file_bytes,
        });
    }
    if head[..4] != MAGIC {
        return Err(Refusal::NotQcow2);
    }
    let version = u32_at(head, 4);
    if !(2..=3).contains(&version) {
        return field("version", format!("{version} is not 2 or 3"));
    }
    let cluster_bits = u32_at(head, 20);
    if !(9..=21).contains(&cluster_bits) {
        return field("cluster_bits", format!("{cluster_bits} is not from 9 to 21"));
    }
    if u32_at(head, 32) != 0 {
        return Err(Refusal::Encrypted);
    }
    let (incompatible, header_bytes) = if version == 2 {
        (0, V2_BYTES)
    } else {
        parse_v3(head, file_bytes, cluster_bits)?
    };
    let header = Header {
        cluster_bits,
        virtual_bytes: u64_at(head, 24),
        incompatible,
        backing: parse_backing(head, header_bytes as u64, 1 << cluster_bits, file_bytes)?,
        l1_entries: u64::from(u32_at(head, 36)),
        l1_offset: u64_at(head, 40),
        file_bytes,
    };
    check_extents(head, &header)?;
    let extensions_end = header.backing.map_or(1 << cluster_bits, |(offset, _)| offset as usize);
    check_extensions(&head[header_bytes..head.len().min(extensions_end)])?;
    Ok(header)
}

/// The fields of version 3: incompatible features and the header's length.
fn parse_v3(head: &[u8], file_bytes: u64, cluster_bits: u32) -> Result<(u64, usize), Refusal> {
    if head.len() < V3_BYTES {
        return Err(Refusal::Truncated {
            needed_bytes: V3_BYTES as u64,
            file_bytes,
        });
    }
    let incompatible = u64_at(head, 72);
    if incompatible & DATA_FILE != 0 {
        return Err(Refusal::DataFile);
    }
    let unknown = incompatible & !(DIRTY | CORRUPT | COMPRESSION | EXTENDED_L2);
    if unknown != 0 {
        return Err(Refusal::UnknownFeatures { bits: unknown });
    }
    if incompatible & EXTENDED_L2 != 0 && cluster_bits < 14 {
        return field(
            "cluster_bits",
            format!("{cluster_bits} is below 14, the least for subclusters"),
        );
    }
    let refcount_order = u32_at(head, 96);
    if refcount_order > 6 {
        return field("refcount_order", format!("{refcount_order} is above 6"));
    }
    let length = u64::from(u32_at(head, 100));
    if length < V3_BYTES as u64 || length > 1 << cluster_bits || !length.is_multiple_of(8) {
        return field(
            "header_length",
            format!("{length} is not a multiple of 8 from {V3_BYTES} to the cluster's size"),
        );
    }
    if length > head.len() as u64 {
        return Err(Refusal::Truncated {
            needed_bytes: length,
            file_bytes,
        });
    }
    let compression = if length > V3_BYTES as u64 { head[V3_BYTES] } else { 0 };
    let marked = incompatible & COMPRESSION != 0;
    if compression > 1 || marked != (compression != 0) {
        return field(
            "compression_type",
            format!("{compression} is unknown or does not agree with the feature bits"),
        );
    }
    Ok((incompatible, length as usize))
}

/// Where the backing file's name is: within the first cluster, after the header.
fn parse_backing(head: &[u8], header: u64, cluster: u64, file_bytes: u64) -> Result<Option<(u64, u64)>, Refusal> {
    let (offset, length) = (u64_at(head, 8), u64::from(u32_at(head, 16)));
    if offset == 0 && length == 0 {
        return Ok(None);
    }
    let end = offset.saturating_add(length);
    if length == 0 || length > BACKING_NAME_BYTES_MAX || offset < header || end > cluster.min(file_bytes) {
        return field(
            "backing_file_offset",
            format!("a name of {length} bytes at {offset} is not in the first cluster"),
        );
    }
    Ok(Some((offset, length)))
}

/// The virtual size and the tables: bounded, aligned, in the file, and large enough for one another.
fn check_extents(head: &[u8], header: &Header) -> Result<(), Refusal> {
    let (cluster, file_bytes) = (header.cluster_bytes(), header.file_bytes);
    if header.virtual_bytes == 0 || header.virtual_bytes > VIRTUAL_BYTES_MAX {
        return Err(Refusal::VirtualSize {
            bytes: header.virtual_bytes,
            limit: VIRTUAL_BYTES_MAX,
        });
    }
    let entry_bytes = if header.incompatible & EXTENDED_L2 != 0 { 16 } else { 8 };
    // One L2 table is one cluster: it maps cluster/entry_bytes clusters.
    let mapped = cluster * (cluster / entry_bytes);
    let needed = header.virtual_bytes.div_ceil(mapped);
    if header.l1_entries < needed || header.l1_entries * 8 > L1_BYTES_MAX {
        let entries = header.l1_entries;
        return field(
            "l1_size",
            format!("{entries} entries; the virtual size needs {needed}, 2^22 are allowed"),
        );
    }
    within(
        "l1_table_offset",
        header.l1_offset,
        header.l1_entries * 8,
        cluster,
        file_bytes,
    )?;
    let refcount_bytes = u64::from(u32_at(head, 56)) * cluster;
    if refcount_bytes == 0 || refcount_bytes > REFCOUNT_TABLE_BYTES_MAX {
        return field(
            "refcount_table_clusters",
            format!("{refcount_bytes} bytes are none, or more than 8 MiB"),
        );
    }
    within(
        "refcount_table_offset",
        u64_at(head, 48),
        refcount_bytes,
        cluster,
        file_bytes,
    )?;
    let snapshots = u64::from(u32_at(head, 60));
    if snapshots > SNAPSHOTS_MAX {
        return field(
            "nb_snapshots",
            format!("{snapshots} are more than {SNAPSHOTS_MAX}; delete some"),
        );
    }
    if snapshots > 0 {
        within(
            "snapshots_offset",
            u64_at(head, 64),
            snapshots * SNAPSHOT_BYTES_MIN,
            cluster,
            file_bytes,
        )?;
    }
    Ok(())
}

/// Goes through the header extensions; those that mean another file or a key are refused.
fn check_extensions(mut rest: &[u8]) -> Result<(), Refusal> {
    for _ in 0..EXTENSIONS_MAX {
        if rest.len() < 8 {
            return Ok(());
        }
        let (kind, length) = (u32_at(rest, 0), u32_at(rest, 4) as usize);
        match kind {
            EXTENSION_END => return Ok(()),
            EXTENSION_DATA_FILE => return Err(Refusal::DataFile),
            EXTENSION_ENCRYPTION => return Err(Refusal::Encrypted),
            _ => {}
        }
        let taken = length
            .checked_next_multiple_of(8)
            .and_then(|length| length.checked_add(8));
        match taken.and_then(|taken| rest.get(taken..)) {
            Some(left) => rest = left,
            None => {
                return field(
                    "header extension",
                    format!("{length} bytes reach past the first cluster"),
                );
            }
        }
    }
    field("header extension", format!("there are more than {EXTENSIONS_MAX}"))
}

/// `offset..offset + length` is in the file, past its first byte, and aligned.
fn within(name: &'static str, offset: u64, length: u64, align: u64, file_bytes: u64) -> Result<(), Refusal> {
    if offset == 0 || !offset.is_multiple_of(align) {
        return field(
            name,
            format!("{offset} is zero or not a multiple of the cluster's {align} bytes"),
        );
    }
    let needed_bytes = offset.saturating_add(length);
    if needed_bytes > file_bytes {
        return Err(Refusal::Truncated {
            needed_bytes,
            file_bytes,
        });
    }
    Ok(())
}

fn field<T>(field: &'static str, problem: String) -> Result<T, Refusal> {
    Err(Refusal::Field { field, problem })
}

/// The big-endian number at `at`; the caller has checked the length.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(word)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(8).map(|word| u64_at(word, 0))
}
