//! What the tests said: counts, and which failed and why, for the last lines of `cargo xtask test`.

use std::fmt;

/// Lines kept of what a failed test said.
const SAID_LINES_MAX: usize = 8;
/// Failed tests that are named; the rest are counted.
const FAILURES_MAX: usize = 30;
/// What is kept of one line.
const LINE_CHARS_MAX: usize = 400;

/// Counts of all test programs together, and their failures.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) ignored: usize,
    /// `NAME: WHY` of tests that could not run here.
    pub(crate) left_out: Vec<String>,
    failures: Vec<Failure>,
    /// Whose words the next lines are.
    speaks: Option<(usize, Voice)>,
}

struct Failure {
    name: String,
    said: Vec<String>,
}

/// How a failed test's words are told from others.
#[derive(Clone, Copy, PartialEq)]
enum Voice {
    /// libtest: all between `---- NAME stdout ----` and the next such line.
    Section,
    /// The end-to-end tests: indented, directly below the test's line.
    Indented,
}

impl Tally {
    /// Takes a line that a test program printed.
    pub(crate) fn see(&mut self, line: &str) {
        if let Some(result) = line.trim_start().strip_prefix("test result: ") {
            self.speaks = None;
            self.count(result);
        } else if let Some((name, _)) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.split_once(" ... FAILED"))
        {
            self.speaks = Some((self.failure(name), Voice::Indented));
        } else if let Some(name) = section(line) {
            self.speaks = Some((self.failure(name), Voice::Section));
        } else {
            self.hear(line);
        }
    }

    /// Takes what stands after `test result: `, such as `ok. 3 passed; 0 failed; 1 ignored; ...`.
    fn count(&mut self, result: &str) {
        let words: Vec<&str> = result.split([' ', ';', '.']).filter(|word| !word.is_empty()).collect();
        let count = |word: &str| -> usize {
            let at = words.iter().position(|one| *one == word);
            at.and_then(|at| words.get(at.checked_sub(1)?)?.parse().ok())
                .unwrap_or(0)
        };
        self.passed += count("passed");
        self.failed += count("failed");
        self.ignored += count("ignored");
    }

    fn failure(&mut self, name: &str) -> usize {
        // libtest names a failed test twice; two programs may have tests of one name, the first has spoken by then.
        let silent = |failure: &Failure| failure.name == name && failure.said.is_empty();
        self.failures.iter().position(silent).unwrap_or_else(|| {
            self.failures.push(Failure {
                name: name.to_owned(),
                said: Vec::new(),
            });
            self.failures.len() - 1
        })
    }

    fn hear(&mut self, line: &str) {
        let Some((index, voice)) = self.speaks else { return };
        let over = match voice {
            Voice::Section => line == "failures:",
            Voice::Indented => !line.starts_with("    "),
        };
        if over {
            self.speaks = None;
            return;
        }
        let line = line.trim();
        let said = &mut self.failures[index].said;
        if !line.is_empty() && !line.starts_with("note: run with") && said.len() < SAID_LINES_MAX {
            said.push(line.chars().take(LINE_CHARS_MAX).collect());
        }
    }

    /// The failed tests, each with what it said.
    pub(crate) fn failures(&self) -> String {
        let mut lines = Vec::new();
        for failure in self.failures.iter().take(FAILURES_MAX) {
            lines.push(format!("failed: {}", failure.name));
            lines.extend(failure.said.iter().map(|line| format!("    {line}")));
        }
        if self.failures.len() > FAILURES_MAX {
            lines.push(format!("failed: {} more", self.failures.len() - FAILURES_MAX));
        }
        lines.join("\n")
    }
}

/// The last line: tests that were left out have not passed.
impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let passed = self.passed.saturating_sub(self.left_out.len());
        write!(f, "{passed} passed, {} failed", self.failed)
    }
}

fn section(line: &str) -> Option<&str> {
    line.strip_prefix("---- ")?.strip_suffix(" stdout ----")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Tally {
        let mut tally = Tally::default();
        text.lines().for_each(|line| tally.see(line));
        tally
    }

    #[test]
    fn counts_are_read_from_libtests_own_lines() {
        let tally = of(
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s\n\
             test result: FAILED. 2 passed; 4 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n\
             test passed_and_failed ... ok",
        );
        assert_eq!(tally.to_string(), "5 passed, 4 failed");
        assert_eq!(tally.ignored, 1);
        assert_eq!(tally.failures(), "");
    }

    #[test]
    fn a_test_that_was_left_out_has_not_passed() {
        let tally = Tally {
            passed: 3,
            left_out: vec!["migrates_to_7_2: no other QEMU".into()],
            ..Tally::default()
        };
        assert_eq!(tally.to_string(), "2 passed, 0 failed");
    }

    #[test]
    fn a_failed_test_is_named_once_with_what_it_said() {
        let tally = of(
            "test good ... ok\ntest bad ... FAILED\n\nfailures:\n\n---- bad stdout ----\n\n\
             thread 'bad' (7) panicked at src/lib.rs:3:5:\nno frame in time\nnote: run with `RUST_BACKTRACE=1`\n\n\n\
             failures:\n    bad\n\ntest result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured\n\
             test bad ... FAILED\n",
        );
        let expected =
            "failed: bad\n    thread 'bad' (7) panicked at src/lib.rs:3:5:\n    no frame in time\nfailed: bad";
        assert_eq!(tally.failures(), expected);
    }

    #[test]
    fn an_end_to_end_test_that_failed_says_why_below_its_line() {
        let tally = of(
            "test a_ring ... FAILED (3.2 s)\n    2 requests were lost\n    logs: /tmp/x\n\
             test crash ... ok (1.0 s)\n    no words of a failure\n",
        );
        assert_eq!(
            tally.failures(),
            "failed: a_ring\n    2 requests were lost\n    logs: /tmp/x"
        );
    }

    #[test]
    fn much_that_failed_is_still_few_lines() {
        let many: String = (0..100)
            .map(|n| format!("test t{n} ... FAILED (1.0 s)\n{}", "    x\n".repeat(50)))
            .collect();
        let shown = of(&many).failures();
        assert_eq!(shown.lines().count(), FAILURES_MAX * (SAID_LINES_MAX + 1) + 1);
        assert!(shown.ends_with("failed: 70 more"));
    }
}
