//! Writes small ISO 9660 images (ECMA-119) with Rock Ridge names (SUSP 1.12, RRIP 1.12): a few files in the root, no more.
//!
//! The same files give the same bytes: there are no times in it.

/// Bytes of a sector.
pub(crate) const SECTOR: usize = 2048;
/// Sectors of the parts, in order: 16 unused ones come first.
const DESCRIPTOR: u32 = 16;
const TABLE: u32 = 18;
const TABLE_BIG_ENDIAN: u32 = 19;
const ROOT: u32 = 20;
const FILES: u32 = 21;
/// Bytes of the root's entry in the table of paths.
const TABLE_BYTES: u32 = 10;
/// The first of January 1970, as directories tell it.
const NO_TIME: [u8; 7] = [70, 1, 1, 0, 0, 0, 0];
/// POSIX modes of a directory and a file that all may read.
const DIRECTORY_MODE: u32 = 0o040_555;
const FILE_MODE: u32 = 0o100_444;

/// A file in the image.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Member<'a> {
    /// Its plain name, at most 8 of A-Z, 0-9 and `_`.
    pub(crate) plain: &'static str,
    /// Its name as a guest sees it.
    pub(crate) name: &'static str,
    /// What it holds, less than 4 GiB.
    pub(crate) content: &'a [u8],
}

/// The image with a label of at most 32 characters. The members' records must fit in one sector, as some ten do.
///
/// # Panics
/// When they do not: names and their number are given by this crate.
pub(crate) fn image(label: &str, members: &[Member<'_>]) -> Vec<u8> {
    let mut root = Vec::with_capacity(SECTOR);
    let here = [&b"SP\x07\x01\xbe\xef\x00"[..], &extension(), &posix(DIRECTORY_MODE, 2)].concat();
    root.extend(record(b"\x00", ROOT, SECTOR as u32, &here));
    root.extend(record(b"\x01", ROOT, SECTOR as u32, &posix(DIRECTORY_MODE, 2)));
    let mut at = FILES;
    let mut data = Vec::new();
    for member in members {
        let more = [posix(FILE_MODE, 1), named(member.name)].concat();
        let plain = format!("{}.;1", member.plain);
        root.extend(record(plain.as_bytes(), at, member.content.len() as u32, &more));
        data.extend(member.content);
        data.resize(data.len().next_multiple_of(SECTOR), 0);
        at = FILES + (data.len() / SECTOR) as u32;
    }
    assert!(root.len() <= SECTOR, "the root directory is one sector");
    let mut image = vec![0; DESCRIPTOR as usize * SECTOR];
    for sector in [
        descriptor(label, at),
        b"\xffCD001\x01".to_vec(),
        table(u32::to_le_bytes, u16::to_le_bytes),
        table(u32::to_be_bytes, u16::to_be_bytes),
        root,
    ] {
        image.extend(sector);
        image.resize(image.len().next_multiple_of(SECTOR), 0);
    }
    image.extend(data);
    image
}

/// The files of an image that [`image`] made, by the names that guests see. What is damaged is left out: images lie where others may
/// write.
pub(crate) fn files(image: &[u8]) -> Vec<(&str, &[u8])> {
    let mut found = vec![];
    let start = ROOT as usize * SECTOR;
    let mut records = image.get(start..start + SECTOR).unwrap_or_default();
    while let Some((&length, _)) = records.split_first()
        && let Some((record, rest)) = records.split_at_checked(usize::from(length).max(1))
        && length > 0
    {
        found.extend(file(image, record));
        records = rest;
    }
    found
}

fn file<'i>(image: &'i [u8], record: &'i [u8]) -> Option<(&'i str, &'i [u8])> {
    let number = |at: usize| Some(u32::from_le_bytes(record.get(at..at + 4)?.try_into().ok()?) as usize);
    let (start, length) = (number(2)?.checked_mul(SECTOR)?, number(10)?);
    let at = record.windows(5).position(|w| w.starts_with(b"NM") && w[3] == 1)?;
    let name = record.get(at + 5..at + usize::from(record[at + 2]))?;
    Some((
        std::str::from_utf8(name).ok()?,
        image.get(start..start.checked_add(length)?)?,
    ))
}

/// The primary volume descriptor (ECMA-119, 8.4).
fn descriptor(label: &str, sectors: u32) -> Vec<u8> {
    let mut all = b"\x01CD001\x01\x00".to_vec();
    all.extend([b' '; 32]);
    all.extend(format!("{label:<32}").into_bytes());
    all.extend([0; 8]);
    all.extend(both(sectors));
    all.extend([0; 32]);
    for number in [1, 1, SECTOR as u16] {
        all.extend(number.to_le_bytes());
        all.extend(number.to_be_bytes());
    }
    all.extend(both(TABLE_BYTES));
    all.extend(TABLE.to_le_bytes());
    all.extend([0; 4]);
    all.extend(TABLE_BIG_ENDIAN.to_be_bytes());
    all.extend([0; 4]);
    all.extend(record(b"\x00", ROOT, SECTOR as u32, &[]));
    // Who made it, and of what: nobody says.
    all.extend([b' '; 4 * 128 + 3 * 37]);
    for _ in 0..4 {
        all.extend([b'0'; 16]);
        all.push(0);
    }
    all.push(1);
    all
}

/// The table of paths, which has the root alone (ECMA-119, 9.4).
fn table(long: fn(u32) -> [u8; 4], short: fn(u16) -> [u8; 2]) -> Vec<u8> {
    [&[1, 0][..], &long(ROOT), &short(1), &[0, 0]].concat()
}

/// A directory's record (ECMA-119, 9.1), with what Rock Ridge says more.
fn record(name: &[u8], at: u32, bytes: u32, more: &[u8]) -> Vec<u8> {
    let is_directory = name.len() == 1;
    let mut all = vec![0, 0];
    all.extend(both(at));
    all.extend(both(bytes));
    all.extend(NO_TIME);
    all.extend([if is_directory { 2 } else { 0 }, 0, 0, 1, 0, 0, 1, name.len() as u8]);
    all.extend(name);
    all.resize(all.len().next_multiple_of(2), 0);
    all.extend(more);
    all.resize(all.len().next_multiple_of(2), 0);
    all[0] = all.len() as u8;
    all
}

/// The extension's name (SUSP, 5.5).
fn extension() -> Vec<u8> {
    [&b"ER\x12\x01\x0a\x00\x00\x01"[..], b"RRIP_1991A"].concat()
}

/// A file's mode, links and owner, root (RRIP, 4.1.1).
fn posix(mode: u32, links: u32) -> Vec<u8> {
    let mut all = b"PX\x24\x01".to_vec();
    for number in [mode, links, 0, 0] {
        all.extend(both(number));
    }
    all
}

/// A file's own name (RRIP, 4.1.4).
fn named(name: &str) -> Vec<u8> {
    [&[b'N', b'M', name.len() as u8 + 5, 1, 0][..], name.as_bytes()].concat()
}

/// A number in both byte orders.
fn both(number: u32) -> [u8; 8] {
    let mut all = [0; 8];
    all[..4].copy_from_slice(&number.to_le_bytes());
    all[4..].copy_from_slice(&number.to_be_bytes());
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Follows the image from its descriptor, as a reader does.
    #[test]
    fn every_file_is_where_its_record_says() {
        let long = vec![b'x'; 5000];
        let members = [
            Member {
                plain: "META_DAT",
                name: "meta-data",
                content: b"one",
            },
            Member {
                plain: "EMPTY",
                name: "empty",
                content: b"",
            },
            Member {
                plain: "LONG",
                name: "long-name",
                content: &long,
            },
        ];
        let image = image("cidata", &members);
        let number = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().unwrap()) as usize;
        let descriptor = 16 * SECTOR;
        assert_eq!(number(descriptor + 80) * SECTOR, image.len());
        assert_eq!(
            &image[descriptor + 881..descriptor + 883],
            [1, 0],
            "the descriptor's version is at its place"
        );
        assert_eq!(number(descriptor + 156 + 2), ROOT as usize);
        let wanted: Vec<_> = members.iter().map(|member| (member.name, member.content)).collect();
        assert_eq!(files(&image), wanted);
    }

    #[test]
    fn what_is_damaged_is_left_out() {
        let good = image(
            "cidata",
            &[Member {
                plain: "ONE",
                name: "one",
                content: b"1",
            }],
        );
        assert_eq!(files(&good), [("one", &b"1"[..])]);
        for length in [0, 100, 20 * SECTOR + 1, good.len() - SECTOR] {
            assert!(files(&good[..length]).is_empty());
        }
        let root = ROOT as usize * SECTOR;
        for place in root..root + 300 {
            let mut bad = good.clone();
            bad[place] = 0xff;
            // Nothing breaks, and nothing beyond the image is read.
            assert!(files(&bad).len() <= 1);
        }
    }
}
