//! A day of rows in one file of bounded size, outside the world: a block for each thing, in it two rings that overwrite themselves.
//!
//! ```text
//!   ┌────────┬──────────────────────────────────────────────────────────────┬─────────
//!   │ header │ block: subject, label │ 360 points of 10 s │ 1440 points of 1 min │ block …
//!   │ 4 KiB  │                        92 KiB                                 │
//!   └────────┴──────────────────────────────────────────────────────────────┴─────────
//!   point = number of its span of time (4 bytes), 12 figures (4 bytes each); little-endian
//! ```
//!
//! Invariants:
//! - A point says of which span it is: what was overwritten or never written is not read as something else.
//! - Points are in the kernel when [`Ring::write`] returns, so they survive the process; a loss of power may take the last ones along.
//! - The file never grows beyond its bound: the thing that was silent for longest gives its block to a new one; if all speak, a new one
//!   is not kept.
//! - What is kept may be lost at any time: a file that is not understood is begun anew.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::Path,
};

use super::columns::{COLUMNS, NOTHING, Row, Subject};

/// Names this form; another number of columns or points is another form.
const MAGIC: &[u8; 24] = b"godwit telemetry ring 1\n";
const FILE_HEADER_BYTES: u64 = 4096;
const BLOCK_HEADER_BYTES: usize = 128;
const POINT_BYTES: usize = 4 + 4 * COLUMNS;
const LABEL_MAX: usize = 63;

/// A block's size, whole pages.
pub(super) const BLOCK_BYTES: u64 = {
    let bytes = BLOCK_HEADER_BYTES + POINT_BYTES * (Step::Fine.points() + Step::Coarse.points());
    bytes.next_multiple_of(4096) as u64
};

/// A thing that was silent for this long may lose its block to one that speaks, s.
const SILENT_S: u64 = 600;

/// How far apart points are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// For the last hour.
    Fine,
    /// For the last day.
    Coarse,
}

impl Step {
    /// Seconds from one point to the next.
    pub(super) const fn seconds(self) -> u64 {
        match self {
            Self::Fine => 10,
            Self::Coarse => 60,
        }
    }

    pub(super) const fn points(self) -> usize {
        match self {
            Self::Fine => 360,
            Self::Coarse => 1440,
        }
    }

    /// Where its points begin in a block.
    const fn offset(self) -> usize {
        match self {
            Self::Fine => BLOCK_HEADER_BYTES,
            Self::Coarse => BLOCK_HEADER_BYTES + POINT_BYTES * Self::Fine.points(),
        }
    }
}

/// The file, and where in it each thing is.
#[derive(Debug)]
pub(super) struct Ring {
    file: File,
    blocks: BTreeMap<Subject, Block>,
    /// Blocks that the file has.
    used: u64,
    blocks_max: u64,
}

#[derive(Clone, Debug)]
struct Block {
    number: u64,
    label: String,
    /// When it was last written, seconds since 1970.
    written_s: u64,
}

impl Ring {
    /// Opens or makes the file. `now_s`: seconds since 1970.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub(super) fn open(path: &Path, bytes_max: u64, now_s: u64) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        let mut ring = Self {
            file,
            blocks: BTreeMap::new(),
            used: 0,
            blocks_max: bytes_max.saturating_sub(FILE_HEADER_BYTES) / BLOCK_BYTES,
        };
        if !ring.take_up(now_s)? {
            ring.begin()?;
        }
        Ok(ring)
    }

    /// Reads which thing has which block; `false` where the file has another form.
    fn take_up(&mut self, now_s: u64) -> io::Result<bool> {
        let mut magic = [0; MAGIC.len()];
        let bytes = self.file.metadata()?.len();
        if bytes < FILE_HEADER_BYTES {
            return Ok(false);
        }
        self.file.read_exact_at(&mut magic, 0)?;
        if magic != *MAGIC {
            tracing::warn!("the file of figures has another form; it is begun anew");
            return Ok(false);
        }
        self.used = ((bytes - FILE_HEADER_BYTES) / BLOCK_BYTES).min(self.blocks_max);
        for number in 0..self.used {
            let mut header = [0; BLOCK_HEADER_BYTES];
            self.file.read_exact_at(&mut header, at(number))?;
            let mut key = [0; Subject::BYTES];
            key.copy_from_slice(&header[..Subject::BYTES]);
            let length = usize::from(header[Subject::BYTES]).min(LABEL_MAX);
            let label = &header[Subject::BYTES + 1..][..length];
            let block = Block {
                number,
                label: String::from_utf8_lossy(label).into_owned(),
                written_s: now_s,
            };
            self.blocks.insert(Subject(key), block);
        }
        // A bound that was lowered takes effect at once.
        self.file.set_len(at(self.used))?;
        Ok(true)
    }

    fn begin(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.set_len(FILE_HEADER_BYTES)?;
        self.file.write_all_at(MAGIC, 0)?;
        (self.blocks, self.used) = (BTreeMap::new(), 0);
        Ok(())
    }

    /// Writes a row as that of some consecutive spans of ten seconds, the last of which is `last`, and into the minutes that they are of.
    /// `false`: there is no room for this thing.
    ///
    /// # Errors
    /// When the disk is full or fails.
    pub(super) fn write(
        &mut self,
        subject: Subject,
        label: &str,
        last: u64,
        spans: u64,
        row: &Row,
    ) -> io::Result<bool> {
        let now_s = last * Step::Fine.seconds();
        let Some(number) = self.block(subject, label, now_s)? else {
            return Ok(false);
        };
        for span in (last + 1).saturating_sub(spans.max(1))..=last {
            self.put(number, Step::Fine, span, row)?;
        }
        let in_a_minute = Step::Coarse.seconds() / Step::Fine.seconds();
        let (first_minute, last_minute) = (
            (last + 1).saturating_sub(spans.max(1)) / in_a_minute,
            last / in_a_minute,
        );
        for minute in first_minute..=last_minute {
            let tens = self.get(number, Step::Fine, minute * in_a_minute, in_a_minute)?;
            self.put(number, Step::Coarse, minute, &mean(&tens))?;
        }
        Ok(true)
    }

    /// The rows of `count` consecutive spans from `first` on, each as many spans of `step` long as are said; nothing where it is not known.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub(super) fn read(&self, subject: Subject, step: Step, first: u64, count: u64) -> io::Result<Vec<Row>> {
        match self.blocks.get(&subject) {
            Some(block) => self.get(block.number, step, first, count),
            None => Ok(vec![NOTHING; usize::try_from(count).unwrap_or(0)]),
        }
    }

    /// Things from one key to another, with what people call them.
    pub(super) fn between(&self, first: Subject, last: Subject) -> Vec<(Subject, String)> {
        let range = self.blocks.range(first..=last);
        range.map(|(subject, block)| (*subject, block.label.clone())).collect()
    }

    /// Bytes of the file.
    pub(super) fn bytes(&self) -> u64 {
        at(self.used)
    }

    fn block(&mut self, subject: Subject, label: &str, now_s: u64) -> io::Result<Option<u64>> {
        if let Some(block) = self.blocks.get_mut(&subject) {
            block.written_s = now_s;
            if block.label != label {
                block.label = cut(label);
                let number = block.number;
                self.write_header(number, subject, label)?;
                return Ok(Some(number));
            }
            return Ok(Some(block.number));
        }
        let number = if self.used < self.blocks_max {
            self.used
        } else {
            let silent = self.blocks.iter().min_by_key(|(_, block)| block.written_s);
            let silent = silent.filter(|(_, block)| now_s.saturating_sub(block.written_s) > SILENT_S);
            let Some((old, number)) = silent.map(|(old, block)| (*old, block.number)) else {
                return Ok(None);
            };
            self.blocks.remove(&old);
            number
        };
        if number == self.used {
            self.file.set_len(at(number + 1))?;
            self.used += 1;
        } else {
            // Emptied before it has a new name: no reader takes the points of the one before for its own.
            let empty = vec![0; usize::try_from(BLOCK_BYTES).unwrap_or(0)];
            self.file.write_all_at(&empty, at(number))?;
        }
        self.write_header(number, subject, label)?;
        let block = Block {
            number,
            label: cut(label),
            written_s: now_s,
        };
        self.blocks.insert(subject, block);
        Ok(Some(number))
    }

    fn write_header(&self, number: u64, subject: Subject, label: &str) -> io::Result<()> {
        let mut header = [0; BLOCK_HEADER_BYTES];
        let label = cut(label);
        header[..Subject::BYTES].copy_from_slice(&subject.0);
        header[Subject::BYTES] = u8::try_from(label.len()).unwrap_or(0);
        header[Subject::BYTES + 1..][..label.len()].copy_from_slice(label.as_bytes());
        self.file.write_all_at(&header, at(number))
    }

    fn put(&self, number: u64, step: Step, span: u64, row: &Row) -> io::Result<()> {
        let mut point = [0; POINT_BYTES];
        point[..4].copy_from_slice(&tag(span).to_le_bytes());
        for (to, figure) in point[4..].chunks_exact_mut(4).zip(row) {
            to.copy_from_slice(&figure.to_le_bytes());
        }
        let place = step.offset() + POINT_BYTES * place(step, span);
        self.file.write_all_at(&point, at(number) + place as u64)
    }

    fn get(&self, number: u64, step: Step, first: u64, count: u64) -> io::Result<Vec<Row>> {
        let count = count.min(step.points() as u64);
        let mut bytes = vec![0; POINT_BYTES * step.points()];
        // A few points that lie together are read alone.
        let (from, points) = match place(step, first) + usize::try_from(count).unwrap_or(0) {
            end if end <= step.points() => (place(step, first), end - place(step, first)),
            _ => (0, step.points()),
        };
        let wanted = &mut bytes[POINT_BYTES * from..POINT_BYTES * (from + points)];
        self.file
            .read_exact_at(wanted, at(number) + (step.offset() + POINT_BYTES * from) as u64)?;
        let row = |span: u64| {
            let point = &bytes[POINT_BYTES * place(step, span)..][..POINT_BYTES];
            let (its, figures) = point.split_at(4);
            let mut row = NOTHING;
            if its == tag(span).to_le_bytes() {
                for (to, from) in row.iter_mut().zip(figures.chunks_exact(4)) {
                    *to = f32::from_le_bytes([from[0], from[1], from[2], from[3]]);
                }
            }
            row
        };
        Ok((first..first + count).map(row).collect())
    }
}

/// Where a block begins.
const fn at(number: u64) -> u64 {
    FILE_HEADER_BYTES + number * BLOCK_BYTES
}

fn place(step: Step, span: u64) -> usize {
    usize::try_from(span % step.points() as u64).unwrap_or(0)
}

/// What a point says of its span: never 0, which is an empty point's.
fn tag(span: u64) -> u32 {
    (span as u32).max(1)
}

fn cut(label: &str) -> String {
    let mut end = label.len().min(LABEL_MAX);
    while !label.is_char_boundary(end) {
        end -= 1;
    }
    label[..end].to_owned()
}

/// The mean of each column over the rows in which it was measured.
pub(super) fn mean(rows: &[Row]) -> Row {
    let mut means = NOTHING;
    for (column, mean) in means.iter_mut().enumerate() {
        let measured = || rows.iter().map(|row| row[column]).filter(|figure| !figure.is_nan());
        let count = measured().count();
        if count > 0 {
            *mean = (measured().map(f64::from).sum::<f64>() / count as f64) as f32;
        }
    }
    means
}

#[cfg(test)]
mod tests {
    use model::VmId;
    use uuid::Uuid;

    use super::*;

    fn vm(n: u128) -> Subject {
        Subject::vm(VmId(Uuid::from_u128(n)))
    }

    fn row(figure: f32) -> Row {
        let mut row = NOTHING;
        row[0] = figure;
        row
    }

    fn first(rows: &[Row]) -> Vec<Option<f32>> {
        rows.iter()
            .map(|row| Some(row[0]).filter(|figure| !figure.is_nan()))
            .collect()
    }

    #[test]
    fn rows_are_read_again_by_another_process_and_minutes_are_their_means() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ring");
        let span = 6 * 1000;
        {
            let mut ring = Ring::open(&path, 1 << 30, 0).unwrap();
            for n in 0..6 {
                assert!(ring.write(vm(1), "", span + n, 1, &row(n as f32)).unwrap());
            }
            assert!(ring.write(vm(2), "two", span, 1, &row(7.0)).unwrap());
        }
        let ring = Ring::open(&path, 1 << 30, 0).unwrap();
        let rows = ring.read(vm(1), Step::Fine, span - 1, 8).unwrap();
        let wanted = [
            None,
            Some(0.0),
            Some(1.0),
            Some(2.0),
            Some(3.0),
            Some(4.0),
            Some(5.0),
            None,
        ];
        assert_eq!(first(&rows), wanted);
        let minutes = ring.read(vm(1), Step::Coarse, span / 6, 2).unwrap();
        assert_eq!(first(&minutes), [Some(2.5), None]);
        assert_eq!(
            first(&ring.read(vm(2), Step::Coarse, span / 6, 1).unwrap()),
            [Some(7.0)]
        );
        assert_eq!(ring.between(vm(0), vm(9)).len(), 2);
        assert_eq!(first(&ring.read(vm(3), Step::Fine, span, 1).unwrap()), [None]);
    }

    #[test]
    fn a_look_that_came_late_covers_the_spans_that_it_is_the_mean_of() {
        let dir = tempfile::tempdir().unwrap();
        let mut ring = Ring::open(&dir.path().join("ring"), 1 << 30, 0).unwrap();
        ring.write(vm(1), "", 6001, 2, &row(4.0)).unwrap();
        let rows = ring.read(vm(1), Step::Fine, 5999, 4).unwrap();
        assert_eq!(first(&rows), [None, Some(4.0), Some(4.0), None]);
    }

    #[test]
    fn what_is_overwritten_is_gone_and_is_never_taken_for_newer() {
        let dir = tempfile::tempdir().unwrap();
        let mut ring = Ring::open(&dir.path().join("ring"), 1 << 30, 0).unwrap();
        let (old, new) = (6000, 6000 + Step::Fine.points() as u64);
        ring.write(vm(1), "", old, 1, &row(1.0)).unwrap();
        // The same place, one round later, not written yet.
        assert_eq!(first(&ring.read(vm(1), Step::Fine, new, 1).unwrap()), [None]);
        ring.write(vm(1), "", new, 1, &row(2.0)).unwrap();
        assert_eq!(first(&ring.read(vm(1), Step::Fine, old, 1).unwrap()), [None]);
        let whole = ring.read(vm(1), Step::Fine, old + 1, u64::MAX).unwrap();
        assert_eq!((whole.len(), first(&whole).last().copied().flatten()), (360, Some(2.0)));
        assert_eq!(first(&ring.read(vm(1), Step::Coarse, old / 6, 1).unwrap()), [Some(1.0)]);
    }

    #[test]
    fn the_file_never_grows_beyond_its_bound_and_the_silent_make_room() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ring");
        let bound = FILE_HEADER_BYTES + 3 * BLOCK_BYTES + 17;
        let mut ring = Ring::open(&path, bound, 0).unwrap();
        let now = 100_000;
        for n in 1..=3 {
            assert!(ring.write(vm(n), "", now, 1, &row(1.0)).unwrap());
        }
        assert!(!ring.write(vm(4), "", now, 1, &row(1.0)).unwrap(), "all speak");
        let later = now + SILENT_S / 10 + 1;
        ring.write(vm(2), "", later, 1, &row(1.0)).unwrap();
        ring.write(vm(3), "", later, 1, &row(1.0)).unwrap();
        assert!(ring.write(vm(4), "", later, 1, &row(9.0)).unwrap());
        let its = ring.read(vm(4), Step::Fine, later - 100, 101).unwrap();
        assert_eq!(
            first(&its).iter().flatten().collect::<Vec<_>>(),
            [&9.0],
            "nothing of the one before"
        );
        assert_eq!(first(&ring.read(vm(1), Step::Fine, now, 1).unwrap()), [None]);
        assert!(std::fs::metadata(&path).unwrap().len() <= bound && ring.bytes() <= bound);
        drop(ring);
        let ring = Ring::open(&path, FILE_HEADER_BYTES + BLOCK_BYTES, 0).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), ring.bytes());
        assert_eq!(ring.blocks.len(), 1);
    }

    #[test]
    fn a_thing_takes_as_much_as_the_documents_say_however_long_it_is_watched() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ring");
        let mut ring = Ring::open(&path, 512 << 20, 0).unwrap();
        for span in 6000..6400 {
            for n in 0..3 {
                assert!(ring.write(vm(n), "", span, 1, &[1.0; COLUMNS]).unwrap());
            }
        }
        let bytes = std::fs::metadata(&path).unwrap().len();
        assert_eq!((bytes, BLOCK_BYTES), (FILE_HEADER_BYTES + 3 * BLOCK_BYTES, 92 << 10));
        assert_eq!(bytes, ring.bytes());
    }

    #[test]
    fn a_file_of_another_form_or_cut_off_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ring");
        for content in [vec![], b"short".to_vec(), vec![0xff; 9000]] {
            std::fs::write(&path, &content).unwrap();
            let mut ring = Ring::open(&path, 1 << 30, 0).unwrap();
            assert!(ring.write(vm(1), "", 6000, 1, &row(1.0)).unwrap());
            assert_eq!(first(&ring.read(vm(1), Step::Fine, 6000, 1).unwrap()), [Some(1.0)]);
        }
        // A block that a crash cut off is not taken for whole.
        let bytes = std::fs::metadata(&path).unwrap().len();
        std::fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(bytes - 1)
            .unwrap();
        let ring = Ring::open(&path, 1 << 30, 0).unwrap();
        assert_eq!(first(&ring.read(vm(1), Step::Fine, 6000, 1).unwrap()), [None]);
    }

    #[test]
    fn long_labels_are_cut_where_a_character_ends() {
        assert_eq!(cut(&"ä".repeat(40)).len(), 62);
        assert_eq!(cut("eth0"), "eth0");
    }
}
