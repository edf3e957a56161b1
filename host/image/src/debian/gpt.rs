//! Writes a GUID partition table (UEFI Specification 2.10, chapter 5) with its protective MBR, which holds GRUB's first stage.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use uuid::{Uuid, uuid};

/// Bytes of a sector.
pub(crate) const SECTOR: u64 = 512;
/// Entries of the table, of 128 bytes each: what the specification asks for at least.
const ENTRIES: usize = 128;
const ENTRY_BYTES: usize = 128;
/// Sectors of the entries.
const TABLE_SECTORS: u64 = (ENTRIES * ENTRY_BYTES) as u64 / SECTOR;
const HEADER_BYTES: usize = 92;
/// Where code ends in an MBR and its own table begins.
const MBR_CODE_BYTES: usize = 440;
const MBR_TABLE: usize = 446;

/// Holds GRUB's core for BIOS.
pub(crate) const BIOS_BOOT: Uuid = uuid!("21686148-6449-6e6f-744e-656564454649");
/// The EFI system partition.
pub(crate) const EFI_SYSTEM: Uuid = uuid!("c12a7328-f81f-11d2-ba4b-00a0c93ec93b");
/// A root file system for x86-64 (UAPI Group, Discoverable Partitions Specification).
pub(crate) const LINUX_ROOT: Uuid = uuid!("4f68bce3-e8cd-4db1-96e7-fbcaf984b709");

/// A partition.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Partition {
    /// Its type.
    pub(crate) kind: Uuid,
    /// Its own id.
    pub(crate) id: Uuid,
    /// Its name, ASCII, at most 36 characters.
    pub(crate) name: &'static str,
    /// Its first sector.
    pub(crate) first: u64,
    /// How many sectors it has.
    pub(crate) sectors: u64,
}

/// The sectors that partitions may use on a disk of `sectors`: first, and behind the last.
pub(crate) fn usable(sectors: u64) -> (u64, u64) {
    (2 + TABLE_SECTORS, sectors.saturating_sub(1 + TABLE_SECTORS))
}

/// Writes both copies of the table, and the MBR with `code` for BIOS.
///
/// # Errors
/// When the file cannot be written.
pub(crate) fn write(disk: &File, sectors: u64, id: Uuid, partitions: &[Partition], code: &[u8]) -> io::Result<()> {
    let mut table = vec![0; ENTRIES * ENTRY_BYTES];
    for (partition, entry) in partitions.iter().zip(table.chunks_exact_mut(ENTRY_BYTES)) {
        entry[..16].copy_from_slice(&partition.kind.to_bytes_le());
        entry[16..32].copy_from_slice(&partition.id.to_bytes_le());
        entry[32..40].copy_from_slice(&partition.first.to_le_bytes());
        entry[40..48].copy_from_slice(&(partition.first + partition.sectors - 1).to_le_bytes());
        for (unit, place) in partition.name.encode_utf16().zip(entry[56..].chunks_exact_mut(2)) {
            place.copy_from_slice(&unit.to_le_bytes());
        }
    }
    let (backup, backup_table) = (sectors - 1, sectors - 1 - TABLE_SECTORS);
    disk.write_all_at(&mbr(sectors, code), 0)?;
    disk.write_all_at(&header(sectors, id, &table, (1, backup, 2)), SECTOR)?;
    disk.write_all_at(&table, 2 * SECTOR)?;
    disk.write_all_at(&table, backup_table * SECTOR)?;
    disk.write_all_at(&header(sectors, id, &table, (backup, 1, backup_table)), backup * SECTOR)
}

/// A header at sector `here`, whose copy is at `other`, with its entries from sector `table_at`.
fn header(sectors: u64, id: Uuid, table: &[u8], (here, other, table_at): (u64, u64, u64)) -> Vec<u8> {
    let (first, end) = usable(sectors);
    let mut header = Vec::with_capacity(SECTOR as usize);
    header.extend(b"EFI PART");
    for word in [0x0001_0000, HEADER_BYTES as u32, 0, 0] {
        header.extend(word.to_le_bytes());
    }
    for sector in [here, other, first, end - 1] {
        header.extend(sector.to_le_bytes());
    }
    header.extend(id.to_bytes_le());
    header.extend(table_at.to_le_bytes());
    for word in [ENTRIES as u32, ENTRY_BYTES as u32, crc32fast::hash(table)] {
        header.extend(word.to_le_bytes());
    }
    let sum = crc32fast::hash(&header);
    header[16..20].copy_from_slice(&sum.to_le_bytes());
    header.resize(SECTOR as usize, 0);
    header
}

/// The protective MBR: one partition over everything, so that old tools do not take the disk for empty.
fn mbr(sectors: u64, code: &[u8]) -> Vec<u8> {
    let mut mbr = vec![0; SECTOR as usize];
    let length = code.len().min(MBR_CODE_BYTES);
    mbr[..length].copy_from_slice(&code[..length]);
    let entry = &mut mbr[MBR_TABLE..MBR_TABLE + 16];
    entry[1..8].copy_from_slice(&[0x00, 0x02, 0x00, 0xee, 0xff, 0xff, 0xff]);
    entry[8..12].copy_from_slice(&1u32.to_le_bytes());
    let rest = u32::try_from(sectors - 1).unwrap_or(u32::MAX);
    entry[12..16].copy_from_slice(&rest.to_le_bytes());
    mbr[510..].copy_from_slice(&[0x55, 0xaa]);
    mbr
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Run;
    use std::time::Duration;

    /// util-linux reads it as firmware would: both copies, their sums, names and types.
    #[test]
    fn another_reader_finds_the_partitions_and_both_copies_sound() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let sectors = 131_072;
        file.as_file().set_len(sectors * SECTOR).unwrap();
        let partitions = [
            Partition {
                kind: BIOS_BOOT,
                id: Uuid::from_u128(1),
                name: "bios",
                first: 2048,
                sectors: 2048,
            },
            Partition {
                kind: LINUX_ROOT,
                id: Uuid::from_u128(2),
                name: "root",
                first: 4096,
                sectors: usable(sectors).1 - 4096,
            },
        ];
        write(file.as_file(), sectors, Uuid::from_u128(3), &partitions, &[0xeb]).unwrap();
        let sfdisk = |option: &str| {
            let run = Run::new("sfdisk", Duration::from_secs(20)).arg(option).arg(file.path());
            String::from_utf8(run.merged().output().unwrap()).unwrap()
        };
        assert!(
            sfdisk("--verify").contains("No errors detected"),
            "{}",
            sfdisk("--verify")
        );
        let dump = sfdisk("--dump");
        for expected in [
            "label-id: 00000000-0000-0000-0000-000000000003",
            "start=        2048, size=        2048, type=21686148-6449-6E6F-744E-656564454649",
            "type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, uuid=00000000-0000-0000-0000-000000000002, name=\"root\"",
            "last-lba: 131038",
        ] {
            assert!(dump.contains(expected), "{expected} is missing in:\n{dump}");
        }
    }
}
