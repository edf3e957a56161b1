//! The tests of one file, in order, over one fixture that they share: a cluster takes longer to start than most promises take
//! to check. It says how it went in libtest's words, and the fixture is dropped, so removed, however it went.

use anyhow::{Result, bail};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

/// What the tests of a file share.
pub trait Fixture: Sized {
    /// Makes it.
    ///
    /// # Errors
    /// Then every test has failed.
    fn set_up() -> Result<Self>;

    /// What has to hold after every test. It also removes what a test that failed left behind, so that the next begins clean.
    ///
    /// # Errors
    /// Then the test has failed.
    fn after_each(&mut self) -> Result<()>;

    /// Keeps what tells why a test failed, and says where.
    fn keep(&self) -> Option<PathBuf>;
}

/// One test: its name is the promise.
#[derive(Debug)]
pub struct Case<F> {
    /// Its name.
    pub name: &'static str,
    /// What it does.
    pub body: fn(&mut F) -> Result<()>,
}

/// The cases with these functions' names.
#[macro_export]
macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        &[$($crate::suite::Case { name: stringify!($name), body: $name }),*]
    };
}

/// What the command line chose.
#[derive(Debug, Default, PartialEq, Eq)]
struct Chosen {
    list: bool,
    exact: bool,
    filters: Vec<String>,
}

impl Chosen {
    /// libtest's options; those that change nothing here are taken and ignored.
    fn from(words: impl Iterator<Item = String>) -> Result<Chosen> {
        let mut chosen = Chosen::default();
        let mut words = words.peekable();
        while let Some(word) = words.next() {
            match word.as_str() {
                "--list" => chosen.list = true,
                "--exact" => chosen.exact = true,
                "--nocapture" | "--no-capture" | "--quiet" | "-q" | "--show-output" => {}
                "--test-threads" | "--color" | "--format" => drop(words.next()),
                other if other.starts_with("--test-threads=") || other.starts_with("--color=") => {}
                other if other.starts_with('-') => bail!("`{other}` is not an option of these tests"),
                _ => chosen.filters.push(word),
            }
        }
        Ok(chosen)
    }

    fn takes(&self, name: &str) -> bool {
        self.filters.is_empty()
            || self.filters.iter().any(|filter| {
                if self.exact {
                    name == filter
                } else {
                    name.contains(filter.as_str())
                }
            })
    }
}

/// Runs the chosen cases in order. A program's `main` ends with it.
pub fn main<F: Fixture>(cases: &[Case<F>]) -> ExitCode {
    let chosen = match Chosen::from(std::env::args().skip(1)) {
        Ok(chosen) => chosen,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    let taken: Vec<&Case<F>> = cases.iter().filter(|case| chosen.takes(case.name)).collect();
    if chosen.list {
        taken.iter().for_each(|case| println!("{}: test", case.name));
        return ExitCode::SUCCESS;
    }
    let began = Instant::now();
    println!("\nrunning {} tests", taken.len());
    let failed = if taken.is_empty() { 0 } else { run(&taken) };
    let (word, passed) = (if failed == 0 { "ok" } else { "FAILED" }, taken.len() - failed);
    println!(
        "\ntest result: {word}. {passed} passed; {failed} failed; 0 ignored; 0 measured; {} filtered out; finished in {:.2}s\n",
        cases.len() - taken.len(),
        began.elapsed().as_secs_f64()
    );
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(101)
    }
}

/// Runs them all and returns how many failed.
fn run<F: Fixture>(cases: &[&Case<F>]) -> usize {
    let mut fixture = match F::set_up() {
        Ok(fixture) => fixture,
        Err(error) => {
            for (number, case) in cases.iter().enumerate() {
                println!("test {} ... FAILED", case.name);
                if number == 0 {
                    println!("    the fixture cannot be set up: {error:#}");
                }
            }
            return cases.len();
        }
    };
    let mut failed = 0;
    for case in cases {
        let began = Instant::now();
        let body = flat(catch_unwind(AssertUnwindSafe(|| (case.body)(&mut fixture))));
        let kept = body.is_err().then(|| fixture.keep()).flatten();
        let after = flat(catch_unwind(AssertUnwindSafe(|| fixture.after_each())));
        let seconds = began.elapsed().as_secs_f64();
        let errors: Vec<String> = [body, after]
            .into_iter()
            .filter_map(Result::err)
            .map(|error| format!("{error:#}"))
            .collect();
        if errors.is_empty() {
            println!("test {} ... ok ({seconds:.1} s)", case.name);
            continue;
        }
        failed += 1;
        println!("test {} ... FAILED ({seconds:.1} s)", case.name);
        errors.iter().for_each(|error| println!("    {error}"));
        if let Some(dir) = kept.or_else(|| fixture.keep()) {
            println!("    logs: {}", dir.display());
        }
    }
    failed
}

/// A panic, which has said its message already, as an error.
fn flat(outcome: std::thread::Result<Result<()>>) -> Result<()> {
    outcome.unwrap_or_else(|_| bail!("it panicked"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::rc::Rc;

    thread_local! {
        static DROPS: Rc<RefCell<Vec<&'static str>>> = Rc::default();
    }

    struct Noted(u32);

    impl Fixture for Noted {
        fn set_up() -> Result<Self> {
            Ok(Noted(0))
        }

        fn after_each(&mut self) -> Result<()> {
            anyhow::ensure!(self.0 != 2, "the second test left something");
            Ok(())
        }

        fn keep(&self) -> Option<PathBuf> {
            None
        }
    }

    impl Drop for Noted {
        fn drop(&mut self) {
            DROPS.with(|drops| drops.borrow_mut().push("dropped"));
        }
    }

    fn counts(noted: &mut Noted) -> Result<()> {
        noted.0 += 1;
        Ok(())
    }

    fn breaks(_: &mut Noted) -> Result<()> {
        bail!("as it should")
    }

    fn panics(_: &mut Noted) -> Result<()> {
        panic!("as it should")
    }

    #[test]
    fn a_failure_a_panic_and_a_residue_each_count_once_and_the_fixture_is_dropped() {
        let cases: &[Case<Noted>] = crate::cases![counts, breaks, panics];
        assert_eq!(run(&cases.iter().collect::<Vec<_>>()), 2);
        let residue: &[Case<Noted>] = crate::cases![counts, counts];
        assert_eq!(run(&residue.iter().collect::<Vec<_>>()), 1);
        DROPS.with(|drops| assert_eq!(*drops.borrow(), ["dropped", "dropped"]));
    }

    #[test]
    fn names_are_chosen_as_libtest_chooses() {
        let chosen = |words: &[&str]| Chosen::from(words.iter().map(|word| (*word).to_owned()));
        assert!(chosen(&["ring", "--test-threads=1"]).unwrap().takes("a_ring_of_moves"));
        assert!(!chosen(&["ring", "--exact"]).unwrap().takes("a_ring_of_moves"));
        assert!(chosen(&["--test-threads", "1"]).unwrap().takes("anything"));
        assert!(chosen(&["--no-such-option"]).is_err());
    }
}
