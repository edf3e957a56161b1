//! The live line on standard error: what is being done, bytes moved, round, what remains. Where nobody watches it is not there.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use model::operation::Progress;

use super::{safe, units::show_bytes};

/// Of a terminal that does not tell.
const COLUMNS: usize = 80;

/// Characters of the line beside what is done and how far it is: the spinner, the time and the spaces.
const BESIDES: usize = 10;

/// A line that is drawn again and again, and gone in the end.
pub(crate) struct Live(ProgressBar);

impl Live {
    /// Begins; drawn only on a terminal.
    pub(crate) fn new(what: &str) -> Self {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} {elapsed} {wide_msg}") {
            bar.set_style(style);
        }
        bar.set_prefix(safe::text(what));
        bar.enable_steady_tick(Duration::from_millis(100));
        Self(bar)
    }

    /// Whether somebody sees it.
    pub(crate) fn is_seen(&self) -> bool {
        !self.0.is_hidden()
    }

    /// Says what is being done.
    pub(crate) fn say(&self, text: &str) {
        self.0.set_message(safe::text(text));
    }

    /// Says how far it is, in as many words as the terminal has room for.
    pub(crate) fn tell(&self, progress: &Progress) {
        let columns = rustix::termios::tcgetwinsize(std::io::stderr()).map_or(COLUMNS, |size| usize::from(size.ws_col));
        let taken = self.0.prefix().chars().count() + BESIDES;
        self.say(&fitting(progress, columns.saturating_sub(taken)));
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Progress in at most so many characters, if there is a way to say it in so few: what remains is left out last.
fn fitting(progress: &Progress, room: usize) -> String {
    let without = |doing: bool, bytes: bool, round: bool| {
        let mut less = progress.clone();
        if !doing && (less.bytes > 0 || less.remaining_bytes.is_some()) {
            less.doing = String::new();
        }
        less.bytes = if bytes { less.bytes } else { 0 };
        less.round = less.round.filter(|_| round);
        words(&less)
    };
    let ways = [
        without(true, true, true),
        without(false, true, true),
        without(false, true, false),
        without(false, false, false),
    ];
    let [.., shortest] = &ways;
    let found = ways.iter().find(|way| way.chars().count() <= room);
    found.unwrap_or(shortest).clone()
}

/// Progress in words. Bytes moved only grow; what remains is told as known, never as a share of a whole that changes.
pub(crate) fn words(progress: &Progress) -> String {
    let mut words = vec![progress.doing.clone()];
    if progress.bytes > 0 {
        words.push(format!("{} moved", show_bytes(progress.bytes)));
    }
    if let Some(round) = progress.round {
        words.push(format!("round {round}"));
    }
    if let Some(remaining) = progress.remaining_bytes {
        words.push(format!("{} remaining", show_bytes(remaining)));
    }
    words.retain(|word| !word.is_empty());
    words.join(" · ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_bytes_round_and_what_remains() {
        let progress = Progress {
            doing: "iterative-pre-copy".to_owned(),
            bytes: 300 << 20,
            remaining_bytes: Some(1 << 20),
            round: Some(2),
        };
        assert_eq!(
            words(&progress),
            "iterative-pre-copy · 300.0 MiB moved · round 2 · 1.0 MiB remaining"
        );
        assert_eq!(words(&Progress::default()), "");
    }

    #[test]
    fn on_eighty_columns_nothing_is_cut_off() {
        let progress = Progress {
            doing: "copying memory".to_owned(),
            bytes: 81 << 20,
            remaining_bytes: Some(170 << 20),
            round: Some(1),
        };
        for name in ["web1", "a-name-of-thirty-characters-xy", &"x".repeat(40)] {
            let room = COLUMNS - BESIDES - "migrate-vm ".len() - name.len();
            let said = fitting(&progress, room);
            assert!(said.chars().count() <= room, "{said}");
            assert!(said.contains("170.0 MiB remaining"), "{said}");
        }
        assert_eq!(fitting(&progress, 55), "81.0 MiB moved · round 1 · 170.0 MiB remaining");
        let import = Progress {
            doing: "checking".to_owned(),
            ..Progress::default()
        };
        assert_eq!(fitting(&import, 0), "checking");
    }
}
