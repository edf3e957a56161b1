//! The house rules that no compiler checks: who may depend on whom, sizes, openings, forbidden words, documents.
//!
//! Each rule is a function from text to violations, so that each has a test on a small bad sample. The whole runs as
//! a test of this crate too.

mod docs;
mod edges;
mod openings;
mod source;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::run::{capture, root};

/// One place where a rule is broken, and what to do about it.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Violation {
    /// Relative to the root.
    file: String,
    /// Counted from 1; 0 when the file as a whole is meant.
    line: usize,
    what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.file, self.what),
            line => write!(f, "{}:{line}: {}", self.file, self.what),
        }
    }
}

fn at(file: &str, line: usize, what: impl Into<String>) -> Violation {
    Violation {
        file: file.to_owned(),
        line,
        what: what.into(),
    }
}

/// A tracked file's path, relative to the root, and its text.
pub(crate) struct Tracked {
    path: String,
    text: String,
}

/// Checks the repository and prints what is wrong.
///
/// # Errors
/// When a rule is broken or a file cannot be read.
pub(crate) fn run() -> Result<()> {
    let start = Instant::now();
    let violations = check(&root())?;
    for violation in &violations {
        eprintln!("{violation}");
    }
    if !violations.is_empty() {
        bail!("{} house rules are broken", violations.len());
    }
    println!("tidy: in order, {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// All violations in a checkout, sorted by place.
fn check(root: &Path) -> Result<Vec<Violation>> {
    let files = tracked(root)?;
    let of = |ending: &str| {
        files
            .iter()
            .filter(|file| file.path.ends_with(ending))
            .collect::<Vec<_>>()
    };
    let (rust, manifests, pages) = (of(".rs"), of("Cargo.toml"), of(".md"));

    let crates = edges::crates(&manifests)?;
    let mut violations = edges::check(&crates);
    violations.extend(edges::check_pure(&crates, |path| {
        files
            .iter()
            .find(|file| file.path == path)
            .map(|file| file.text.as_str())
    }));
    violations.extend(openings::check(&crates, &rust));
    violations.extend(docs::check(&manifests, &pages, root)?);
    violations.extend(check_sources(&rust));
    violations.sort();
    Ok(violations)
}

/// Sources are parsed on all cores: this is nearly all of the time.
fn check_sources(files: &[&Tracked]) -> Vec<Violation> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let share = |worker: usize| files.iter().skip(worker).step_by(workers);
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..workers)
            .map(|worker| {
                scope.spawn(move || {
                    share(worker)
                        .flat_map(|file| source::check(&file.path, &file.text))
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        handles
            .into_iter()
            .flat_map(|handle| handle.join().expect("a rule does not panic"))
            .collect()
    })
}

/// What git tracks and is still in the work tree.
fn tracked(root: &Path) -> Result<Vec<Tracked>> {
    let text = capture(
        Command::new("git")
            .current_dir(root)
            .args(["ls-files", "-z", "--", "*.rs", "*.md", "*.toml"]),
    )?;
    let paths = text.split('\0').filter(|path| !path.is_empty()).map(PathBuf::from);
    paths
        .filter(|path| root.join(path).exists())
        .map(|path| {
            let text =
                fs::read_to_string(root.join(&path)).with_context(|| format!("cannot read {}", path.display()))?;
            Ok(Tracked {
                path: path.display().to_string(),
                text,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_repository_is_tidy() {
        let violations = check(&root()).unwrap();
        let shown: Vec<String> = violations.iter().map(Violation::to_string).collect();
        assert!(shown.is_empty(), "\n{}", shown.join("\n"));
    }
}
