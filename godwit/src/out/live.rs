//! The live line on standard error: what is being done, bytes moved, round, what remains. Where nobody watches it is not there.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use model::operation::Progress;

use super::{safe, units::show_bytes};

/// A line that is drawn again and again, and gone in the end.
pub(crate) struct Live(ProgressBar);

impl Live {
    /// Begins; drawn only on a terminal.
    pub(crate) fn new(what: &str) -> Self {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} {wide_msg} {elapsed}") {
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
}

impl Drop for Live {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
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
}
