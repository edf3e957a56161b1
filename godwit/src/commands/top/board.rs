//! What is shown: the last figures, in which order, and what keys make of it.

use std::{cmp::Ordering, ops::ControlFlow};

use clap::ValueEnum;
use model::telemetry::{HostReading, Reading, VmReading};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use crate::out::{safe, table, units};

/// What comes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Sort {
    /// Who uses the CPU most
    #[default]
    Cpu,
    /// Who has most memory
    Memory,
    /// Who sends and receives most
    Network,
    /// Who reads and writes most
    Disk,
    /// By name
    Name,
}

impl Sort {
    const ALL: [Self; 5] = [Self::Cpu, Self::Memory, Self::Network, Self::Disk, Self::Name];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "CPU",
            Self::Memory => "memory",
            Self::Network => "network",
            Self::Disk => "disk",
            Self::Name => "name",
        }
    }

    fn next(self) -> Self {
        let at = Self::ALL.iter().position(|sort| *sort == self).unwrap_or(0);
        Self::ALL[(at + 1) % Self::ALL.len()]
    }
}

/// What was read.
pub(super) enum Seen {
    Vms(Vec<VmReading>),
    Hosts(Vec<HostReading>),
}

/// A column: its title, its cells' width, and whether they are numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Column {
    pub(super) title: &'static str,
    pub(super) width: u16,
    pub(super) is_number: bool,
    /// The less, the sooner it is left out of a narrow terminal; `u8::MAX` never.
    pub(super) worth: u8,
    /// A picture of the past: of no use in a table that is printed once.
    pub(super) is_picture: bool,
}

const fn text(title: &'static str, width: u16, worth: u8) -> Column {
    Column {
        title,
        width,
        is_number: false,
        worth,
        is_picture: false,
    }
}

const fn number(title: &'static str, width: u16, worth: u8) -> Column {
    Column {
        is_number: true,
        ..text(title, width, worth)
    }
}

const fn picture(worth: u8) -> Column {
    Column {
        is_picture: true,
        ..text("", 15, worth)
    }
}

const VM_COLUMNS: [Column; 13] = [
    text("NAME", 18, u8::MAX),
    text("HOST", 10, 9),
    text("STATE", 12, 6),
    number("CPU", 7, u8::MAX),
    picture(8),
    number("WAIT", 7, 4),
    number("MEMORY", 10, u8::MAX),
    picture(2),
    number("RECEIVED", 12, 7),
    number("SENT", 12, 7),
    picture(3),
    number("READ", 12, 5),
    number("WRITTEN", 12, 5),
];

const HOST_COLUMNS: [Column; 15] = [
    text("NAME", 18, u8::MAX),
    text("STATE", 6, 6),
    number("VMS", 5, 9),
    number("CPU", 7, u8::MAX),
    picture(8),
    number("CPUS", 5, 9),
    number("MEMORY", 10, u8::MAX),
    number("OF", 10, 7),
    picture(2),
    number("PRESSURE", 15, 4),
    number("RECEIVED", 12, 7),
    number("SENT", 12, 7),
    picture(3),
    number("READ", 12, 5),
    number("WRITTEN", 12, 5),
];

/// A line: what it is ordered and filtered by, and its cells.
struct Line {
    name: String,
    keys: [f32; 4],
    cells: Vec<String>,
}

/// What is shown, and how.
pub(super) struct Board {
    hosts: bool,
    sort: Sort,
    reverse: bool,
    filter: String,
    /// Keys are letters of the filter.
    typing: bool,
    paused: bool,
    /// The line under the cursor.
    pub(super) selected: usize,
    lines: Vec<Line>,
    unmeasured: usize,
    complaint: Option<String>,
}

impl Board {
    pub(super) fn new(hosts: bool, sort: Sort, filter: String) -> Self {
        Self {
            hosts,
            sort,
            reverse: false,
            filter,
            typing: false,
            paused: false,
            selected: 0,
            lines: vec![],
            unmeasured: 0,
            complaint: None,
        }
    }

    pub(super) const fn is_of_hosts(&self) -> bool {
        self.hosts
    }

    pub(super) const fn is_paused(&self) -> bool {
        self.paused
    }

    pub(super) fn columns(&self) -> &'static [Column] {
        if self.hosts { &HOST_COLUMNS } else { &VM_COLUMNS }
    }

    /// Takes what was read.
    pub(super) fn show(&mut self, seen: Seen) {
        let (lines, unmeasured): (Vec<Line>, usize) = match seen {
            Seen::Vms(vms) => (
                vms.iter().map(vm_line).collect(),
                unmeasured(vms.iter().map(|vm| &vm.reading)),
            ),
            Seen::Hosts(hosts) => {
                let unmeasured = unmeasured(hosts.iter().map(|host| &host.reading));
                (hosts.iter().map(host_line).collect(), unmeasured)
            }
        };
        if !lines.is_empty() {
            self.complaint = None;
        }
        (self.lines, self.unmeasured) = (lines, unmeasured);
        self.order();
    }

    pub(super) fn complain(&mut self, what: &str) {
        self.complaint = Some(what.to_owned());
    }

    fn order(&mut self) {
        let (sort, reverse) = (self.sort, self.reverse);
        self.lines.sort_by(|a, b| {
            let by_name = a.name.cmp(&b.name);
            let figure = match sort {
                Sort::Cpu => 0,
                Sort::Memory => 1,
                Sort::Network => 2,
                Sort::Disk => 3,
                Sort::Name => return if reverse { by_name.reverse() } else { by_name },
            };
            // The most first; what was not measured last, whichever way.
            let order = match (a.keys[figure].is_nan(), b.keys[figure].is_nan()) {
                (false, false) if reverse => a.keys[figure].total_cmp(&b.keys[figure]),
                (false, false) => b.keys[figure].total_cmp(&a.keys[figure]),
                (a, b) => a.cmp(&b),
            };
            if order == Ordering::Equal { by_name } else { order }
        });
        self.selected = self.selected.min(self.lines().count().saturating_sub(1));
    }

    fn lines(&self) -> impl Iterator<Item = &Line> {
        let filter = self.filter.to_lowercase();
        self.lines.iter().filter(move |line| {
            line.cells
                .iter()
                .take(3)
                .any(|cell| cell.to_lowercase().contains(&filter))
        })
    }

    /// The cells of the lines that are shown, in order.
    pub(super) fn cells(&self) -> impl Iterator<Item = &[String]> {
        self.lines().map(|line| line.cells.as_slice())
    }

    /// What stands above the lines.
    pub(super) fn title(&self) -> String {
        let (shown, all) = (self.lines().count(), self.lines.len());
        let what = if self.hosts { "hosts" } else { "VMs" };
        let count = if shown == all {
            format!("{all} {what}")
        } else {
            format!("{shown} of {all} {what}")
        };
        let mut parts = vec![
            count,
            format!("by {}", self.sort.name()) + if self.reverse { ", reversed" } else { "" },
        ];
        if self.typing || !self.filter.is_empty() {
            parts.push(format!(
                "filter: {}{}",
                safe::text(&self.filter),
                if self.typing { "▏" } else { "" }
            ));
        }
        if self.unmeasured > 0 {
            parts.push(format!("{} without figures", self.unmeasured));
        }
        if self.paused {
            parts.push("paused".to_owned());
        }
        parts.join(" · ")
    }

    /// What is wrong, if something is.
    pub(super) fn complaint(&self) -> Option<&str> {
        self.complaint.as_deref()
    }

    /// What keys do.
    pub(super) fn help(&self) -> &'static str {
        match (self.typing, self.hosts) {
            (true, _) => "type a part of a name, host or state · Enter keeps it · Esc drops it",
            (_, true) => "q quit · v VMs · s sort · r reverse · / filter · space pause · ↑↓ move",
            (_, false) => "q quit · h hosts · s sort · r reverse · / filter · space pause · ↑↓ move",
        }
    }

    /// One table, for what is no terminal.
    pub(super) fn table(&self) -> String {
        let kept: Vec<usize> = (0..self.columns().len())
            .filter(|at| !self.columns()[*at].is_picture)
            .collect();
        let heading: Vec<&str> = kept.iter().map(|at| self.columns()[*at].title).collect();
        let rows = self
            .cells()
            .map(|cells| kept.iter().map(|at| cells[*at].clone()).collect());
        table::rows(&heading, rows)
    }

    /// Does what a key says; a break ends it all.
    pub(super) fn press(&mut self, key: KeyEvent) -> ControlFlow<()> {
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return match key.code {
                KeyCode::Char('c' | 'd') => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            };
        }
        if self.typing {
            self.edit(key.code);
            return ControlFlow::Continue(());
        }
        let last = self.lines().count().saturating_sub(1);
        match key.code {
            KeyCode::Char('q') => return ControlFlow::Break(()),
            KeyCode::Char('h') => self.turn_to(true),
            KeyCode::Char('v') => self.turn_to(false),
            KeyCode::Tab => self.turn_to(!self.hosts),
            KeyCode::Char('s') => self.sort = self.sort.next(),
            KeyCode::Char('c') => self.sort = Sort::Cpu,
            KeyCode::Char('m') => self.sort = Sort::Memory,
            KeyCode::Char('n') => self.sort = Sort::Network,
            KeyCode::Char('d') => self.sort = Sort::Disk,
            KeyCode::Char('r') => self.reverse = !self.reverse,
            KeyCode::Char('/') => self.typing = true,
            KeyCode::Char(' ' | 'p') => self.paused = !self.paused,
            KeyCode::Esc => self.filter.clear(),
            KeyCode::Down | KeyCode::Char('j') => self.selected = (self.selected + 1).min(last),
            KeyCode::Up | KeyCode::Char('k') => self.selected = self.selected.saturating_sub(1),
            KeyCode::PageDown => self.selected = (self.selected + 20).min(last),
            KeyCode::PageUp => self.selected = self.selected.saturating_sub(20),
            KeyCode::Home => self.selected = 0,
            KeyCode::End => self.selected = last,
            _ => {}
        }
        self.order();
        ControlFlow::Continue(())
    }

    fn turn_to(&mut self, hosts: bool) {
        if self.hosts != hosts {
            (self.hosts, self.selected, self.complaint) = (hosts, 0, None);
            // Lines of the other kind have other columns.
            self.show(if hosts { Seen::Hosts(vec![]) } else { Seen::Vms(vec![]) });
            self.paused = false;
        }
    }

    fn edit(&mut self, code: KeyCode) {
        const LETTERS_MAX: usize = 64;
        match code {
            KeyCode::Enter => self.typing = false,
            KeyCode::Esc => {
                self.filter.clear();
                self.typing = false;
            }
            KeyCode::Backspace => drop(self.filter.pop()),
            KeyCode::Char(letter) if self.filter.chars().count() < LETTERS_MAX => self.filter.push(letter),
            _ => {}
        }
        self.order();
    }
}

fn unmeasured<'r>(readings: impl Iterator<Item = &'r Reading>) -> usize {
    readings.filter(|reading| reading.at.is_none()).count()
}

fn vm_line(vm: &VmReading) -> Line {
    let of = |name: &str| figure(&vm.reading, name);
    let past = |name: &str| history(&vm.reading, name);
    let (received, sent) = ("network_received_bytes_per_s", "network_sent_bytes_per_s");
    let (read, written) = ("disk_read_bytes_per_s", "disk_written_bytes_per_s");
    let name = vm.name.to_string();
    Line {
        keys: [
            of("cpu_cores"),
            of("memory_bytes"),
            of(received) + of(sent),
            of(read) + of(written),
        ],
        cells: vec![
            name.clone(),
            vm.host.as_ref().map(|host| host.name.to_string()).unwrap_or_default(),
            vm.state.to_string(),
            percent(of("cpu_cores")),
            spark(&past("cpu_cores"), Some(f32::from(vm.vcpus))),
            percent(of("cpu_wait_cores")),
            bytes(of("memory_bytes")),
            spark(&past("memory_bytes"), Some(vm.memory_size_bytes as f32)),
            per_second(of(received)),
            per_second(of(sent)),
            spark(&sums(&past(received), &past(sent)), None),
            per_second(of(read)),
            per_second(of(written)),
        ],
        name,
    }
}

fn host_line(host: &HostReading) -> Line {
    let of = |name: &str| figure(&host.reading, name);
    let past = |name: &str| history(&host.reading, name);
    let (received, sent) = ("network_received_bytes_per_s", "network_sent_bytes_per_s");
    let (read, written) = ("disk_read_bytes_per_s", "disk_written_bytes_per_s");
    let name = host.name.to_string();
    let pressures = ["pressure_cpu_ratio", "pressure_memory_ratio", "pressure_io_ratio"].map(|name| percent(of(name)));
    let pressure = if pressures.iter().all(String::is_empty) {
        String::new()
    } else {
        pressures.join(" ")
    };
    Line {
        keys: [
            of("cpu_cores"),
            of("memory_bytes"),
            of(received) + of(sent),
            of(read) + of(written),
        ],
        cells: vec![
            name.clone(),
            if host.connected { "up" } else { "lost" }.to_owned(),
            host.vms.to_string(),
            percent(of("cpu_cores")),
            spark(&past("cpu_cores"), Some(host.cpus as f32)),
            host.cpus.to_string(),
            bytes(of("memory_bytes")),
            units::show_bytes(host.memory_size_bytes),
            spark(&past("memory_bytes"), Some(host.memory_size_bytes as f32)),
            pressure,
            per_second(of(received)),
            per_second(of(sent)),
            spark(&sums(&past(received), &past(sent)), None),
            per_second(of(read)),
            per_second(of(written)),
        ],
        name,
    }
}

fn figure(reading: &Reading, name: &str) -> f32 {
    reading.figures.get(name).copied().unwrap_or(f32::NAN)
}

fn history(reading: &Reading, name: &str) -> Vec<Option<f32>> {
    reading.history.get(name).cloned().unwrap_or_default()
}

fn sums(a: &[Option<f32>], b: &[Option<f32>]) -> Vec<Option<f32>> {
    a.iter().zip(b).map(|(a, b)| Some((*a)? + (*b)?)).collect()
}

/// Of one CPU, or of the time; empty where it was not measured.
fn percent(ratio: f32) -> String {
    if ratio.is_nan() {
        return String::new();
    }
    format!("{:.0}%", ratio * 100.0)
}

fn bytes(figure: f32) -> String {
    // From a float that is out of range the nearest is taken.
    if figure.is_nan() {
        String::new()
    } else {
        units::show_bytes(figure as u64)
    }
}

fn per_second(figure: f32) -> String {
    match bytes(figure) {
        text if text.is_empty() => text,
        text => text + "/s",
    }
}

/// The past as a row of bars, the newest last. `full`: what the highest bar means; without it, the most that was seen.
fn spark(points: &[Option<f32>], full: Option<f32>) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    const POINTS: usize = 15;
    // Two points a bar, so that five minutes are seen.
    let pairs: Vec<Option<f32>> = points
        .rchunks(2)
        .take(POINTS)
        .map(|pair| pair.iter().flatten().copied().reduce(f32::max))
        .collect();
    let most = full.unwrap_or_else(|| pairs.iter().flatten().copied().fold(0.0, f32::max));
    let bar = |point: &Option<f32>| match point {
        None => ' ',
        Some(_) if most <= 0.0 => BARS[0],
        Some(point) => BARS[((point / most * 8.0) as usize).min(7)],
    };
    pairs.iter().rev().map(bar).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_show_the_newest_last_and_gaps_as_gaps() {
        assert_eq!(spark(&[], None), "");
        let points: Vec<Option<f32>> = vec![
            Some(0.0),
            Some(0.0),
            None,
            None,
            Some(1.0),
            Some(0.5),
            Some(2.0),
            Some(2.0),
        ];
        assert_eq!(spark(&points, Some(2.0)), "▁ ▅█");
        assert_eq!(spark(&points, None), "▁ ▅█");
        assert_eq!(spark(&[Some(0.0), Some(0.0)], None), "▁");
        assert_eq!(spark(&vec![Some(9.0); 100], Some(1.0)), "█".repeat(15));
    }

    #[test]
    fn figures_have_units_and_what_was_not_measured_has_none() {
        assert_eq!((percent(1.534), percent(f32::NAN)), ("153%".to_owned(), String::new()));
        assert_eq!(
            (per_second(1_572_864.0), per_second(f32::NAN)),
            ("1.5 MiB/s".to_owned(), String::new())
        );
        assert_eq!(bytes(f32::INFINITY), units::show_bytes(u64::MAX));
    }
}
