//! The board on a terminal.

use ratatui::{
    Frame,
    layout::{Alignment, Constraint, Layout},
    style::{Color, Modifier, Style},
    text::{Line, Text},
    widgets::{Cell, Paragraph, Row, Table, TableState},
};

use super::board::{Board, Column};

/// Between columns.
const GAP: u16 = 2;

pub(super) fn draw(frame: &mut Frame<'_>, board: &mut Board) {
    let heights = [Constraint::Length(1), Constraint::Min(2), Constraint::Length(1)];
    let [above, middle, below] = Layout::vertical(heights).areas(frame.area());
    let title = Line::from(format!("godwit top   {}", board.title())).style(Style::new().add_modifier(Modifier::BOLD));
    frame.render_widget(Paragraph::new(title), above);
    let fitting = fitting(board.columns(), middle.width);
    let columns = || fitting.iter().map(|at| board.columns()[*at]);
    let header = Row::new(columns().map(|column| cell(column, column.title))).style(Style::new().fg(Color::Cyan));
    let rows = board.cells().map(|cells| {
        let cells = fitting.iter().map(|at| cell(board.columns()[*at], &cells[*at]));
        Row::new(cells)
    });
    let widths: Vec<Constraint> = columns().map(|column| Constraint::Length(column.width)).collect();
    let table = Table::new(rows, widths)
        .header(header)
        .column_spacing(GAP)
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    let mut state = TableState::default().with_selected(Some(board.selected));
    frame.render_stateful_widget(table, middle, &mut state);
    let foot = match board.complaint() {
        Some(complaint) => Line::from(complaint.to_owned()).style(Style::new().fg(Color::Yellow)),
        None => Line::from(board.help()).style(Style::new().add_modifier(Modifier::DIM)),
    };
    frame.render_widget(Paragraph::new(foot), below);
}

fn cell(column: Column, text: &str) -> Cell<'static> {
    let alignment = if column.is_number {
        Alignment::Right
    } else {
        Alignment::Left
    };
    let style = if column.is_picture {
        Style::new().fg(Color::Green)
    } else {
        Style::new()
    };
    Cell::from(Text::from(text.to_owned()).alignment(alignment)).style(style)
}

/// Which columns a terminal of this width has room for: those of most worth, in their order.
fn fitting(columns: &[Column], width: u16) -> Vec<usize> {
    let mut kept: Vec<usize> = (0..columns.len()).collect();
    let needs = |kept: &[usize]| {
        let columns = kept.iter().map(|at| u32::from(columns[*at].width + GAP));
        columns.sum::<u32>().saturating_sub(u32::from(GAP))
    };
    while needs(&kept) > u32::from(width) {
        let least = kept.iter().rposition(|at| {
            let worth = columns[*at].worth;
            worth != u8::MAX && kept.iter().all(|other| columns[*other].worth >= worth)
        });
        match least {
            Some(at) => drop(kept.remove(at)),
            None => break,
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use model::{
        Timestamp, VmState,
        query::Named,
        telemetry::{HostReading, Reading, VmReading},
    };
    use ratatui::{
        Terminal,
        backend::TestBackend,
        crossterm::event::{KeyCode, KeyEvent, KeyModifiers},
    };
    use uuid::Uuid;

    use super::{
        super::board::{Seen, Sort},
        *,
    };

    fn reading(cpu: f32, memory: f32, received: f32) -> Reading {
        let figures = [
            ("cpu_cores", cpu),
            ("cpu_wait_cores", 0.02),
            ("memory_bytes", memory),
            ("network_received_bytes_per_s", received),
            ("network_sent_bytes_per_s", 2048.0),
            ("disk_read_bytes_per_s", 0.0),
            ("disk_written_bytes_per_s", 4096.0),
            ("pressure_cpu_ratio", 0.31),
            ("pressure_memory_ratio", 0.0),
            ("pressure_io_ratio", 0.04),
        ];
        let past = |last: f32| (0..30).map(|n| Some(last * n as f32 / 29.0)).collect();
        let named = |(name, figure): (&str, f32)| (name.to_owned(), figure);
        Reading {
            at: Some(Timestamp(1)),
            history: figures
                .iter()
                .map(|(name, figure)| ((*name).to_owned(), past(*figure)))
                .collect(),
            figures: figures.map(named).into(),
        }
    }

    fn vm(name: &str, host: &str, reading: Reading) -> VmReading {
        VmReading {
            id: Uuid::nil().into(),
            name: name.parse().unwrap(),
            host: Some(Named {
                id: Uuid::nil().into(),
                name: host.parse().unwrap(),
            }),
            state: VmState::Active,
            vcpus: 2,
            memory_size_bytes: 512 << 20,
            reading,
        }
    }

    fn vms() -> Vec<VmReading> {
        vec![
            vm("db1", "h2", reading(0.4, 400e6, 9e6)),
            vm("web1", "h1", reading(1.53, 200e6, 1e6)),
            vm("web2", "h1", Reading::default()),
        ]
    }

    /// The terminal's lines, without the blanks at their ends.
    fn picture(board: &mut Board, width: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, 7)).unwrap();
        terminal.draw(|frame| draw(frame, board)).unwrap();
        let buffer = terminal.backend().buffer();
        let line = |y| {
            let cells = (0..width).map(|x| buffer[(x, y)].symbol());
            cells.collect::<String>().trim_end().to_owned()
        };
        (0..7).map(line).collect::<Vec<_>>().join("\n")
    }

    fn press(board: &mut Board, keys: &str) {
        for key in keys.chars() {
            let code = match key {
                '\n' => KeyCode::Enter,
                '\u{1b}' => KeyCode::Esc,
                key => KeyCode::Char(key),
            };
            assert!(board.press(KeyEvent::new(code, KeyModifiers::NONE)).is_continue());
        }
    }

    fn names(board: &Board) -> Vec<&str> {
        board.cells().map(|cells| cells[0].as_str()).collect()
    }

    #[test]
    fn a_wide_terminal_shows_all_columns() {
        let mut board = Board::new(false, Sort::Cpu, String::new());
        board.show(Seen::Vms(vms()));
        let shown = picture(&mut board, 180);
        let wanted = include_str!("wide.txt");
        assert_eq!(shown.trim_end(), wanted.trim_end(), "\n{shown}");
    }

    #[test]
    fn a_narrow_terminal_shows_what_is_worth_most_and_cuts_no_column() {
        let mut board = Board::new(false, Sort::Cpu, String::new());
        board.show(Seen::Vms(vms()));
        for width in [38, 60, 80, 100, 140] {
            let shown = picture(&mut board, width);
            assert!(
                shown.contains("web1") && shown.contains("153%") && shown.contains("190.7 MiB"),
                "{shown}"
            );
            let columns = fitting(board.columns(), width);
            let title = |at: &usize| board.columns()[*at].title;
            assert!(columns.iter().all(|at| shown.contains(title(at))), "{width}\n{shown}");
        }
        // Whatever the size, nothing breaks.
        assert!(picture(&mut board, 5).contains("godwi"));
    }

    #[test]
    fn hosts_have_their_own_view() {
        let host = HostReading {
            id: Uuid::nil().into(),
            name: "h1".parse().unwrap(),
            connected: true,
            cpus: 4,
            memory_size_bytes: 8 << 30,
            vms: 2,
            reading: reading(2.5, 3e9, 5e6),
        };
        let mut board = Board::new(false, Sort::Cpu, String::new());
        press(&mut board, "h");
        assert!(board.is_of_hosts());
        board.show(Seen::Hosts(vec![host]));
        let shown = picture(&mut board, 200);
        for part in [
            "1 hosts",
            "h1",
            "up",
            "250%",
            "2.8 GiB",
            "8.0 GiB",
            "31% 0% 4%",
            "4.8 MiB/s",
            "▁",
        ] {
            assert!(shown.contains(part), "{part}\n{shown}");
        }
    }

    #[test]
    fn keys_sort_filter_pause_and_end() {
        let mut board = Board::new(false, Sort::Cpu, String::new());
        board.show(Seen::Vms(vms()));
        assert_eq!(names(&board), ["web1", "db1", "web2"]);
        press(&mut board, "m");
        assert_eq!(names(&board), ["db1", "web1", "web2"]);
        press(&mut board, "r");
        assert_eq!(
            names(&board),
            ["web1", "db1", "web2"],
            "what was not measured stays last"
        );
        press(&mut board, "rsss");
        assert_eq!(names(&board), ["db1", "web1", "web2"], "by name");
        press(&mut board, "/WEBq\u{1b}/h1\n");
        assert_eq!(names(&board), ["web1", "web2"]);
        assert!(
            board.title().contains("2 of 3 VMs") && board.title().contains("filter: h1"),
            "{}",
            board.title()
        );
        press(&mut board, " ");
        assert!(board.is_paused() && board.title().contains("paused"));
        press(&mut board, "\u{1b}jjjjj");
        assert_eq!(board.selected, 2);
        board.show(Seen::Vms(vec![]));
        assert_eq!(board.selected, 0);
        assert!(
            board
                .press(KeyEvent::new(KeyCode::Char('q'), KeyModifiers::NONE))
                .is_break()
        );
        assert!(
            board
                .press(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL))
                .is_break()
        );
    }

    #[test]
    fn what_is_printed_once_has_no_pictures() {
        let mut board = Board::new(false, Sort::Network, "web".to_owned());
        board.show(Seen::Vms(vms()));
        let table = board.table();
        let first: Vec<&str> = table.lines().next().unwrap().split_whitespace().collect();
        let heading = [
            "NAME", "HOST", "STATE", "CPU", "WAIT", "MEMORY", "RECEIVED", "SENT", "READ", "WRITTEN",
        ];
        assert_eq!(first, heading);
        assert_eq!(table.lines().count(), 3);
        assert!(table.contains("976.6 KiB/s") && !table.contains('█'), "{table}");
    }

    #[test]
    fn a_figure_that_no_server_of_ours_sends_breaks_nothing() {
        let mut wild = reading(f32::INFINITY, -5.0, f32::MAX);
        wild.history = BTreeMap::from([("cpu_cores".to_owned(), vec![Some(-1.0), Some(f32::INFINITY), None])]);
        let mut board = Board::new(false, Sort::Disk, String::new());
        board.show(Seen::Vms(vec![vm("odd", "h1", wild)]));
        assert!(picture(&mut board, 180).contains("odd"));
    }
}
