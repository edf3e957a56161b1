//! How files and crates open: each file says its purpose, each crate draws itself and names its invariants.

use super::edges::Crate;
use super::{Tracked, Violation, at};

/// Files without a purpose, and crates without a diagram or invariants.
pub(super) fn check(crates: &[Crate], files: &[&Tracked]) -> Vec<Violation> {
    let mut violations = Vec::new();
    for file in files {
        if !file.text.starts_with("//! ") {
            violations.push(at(&file.path, 1, "the first line says the file's purpose: `//! ...`"));
        }
    }
    for one in crates {
        let root = ["src/lib.rs", "src/main.rs"].map(|name| format!("{}/{name}", one.folder));
        if let Some(file) = root
            .iter()
            .find_map(|path| files.iter().find(|file| file.path == *path))
        {
            violations.extend(check_crate(&file.path, &file.text));
        }
    }
    violations
}

fn check_crate(path: &str, text: &str) -> Vec<Violation> {
    let opening: Vec<&str> = text
        .lines()
        .map_while(|line| line.strip_prefix("//!"))
        .map(str::trim)
        .collect();
    let mut violations = Vec::new();
    let Some(start) = opening.iter().position(|line| *line == "```text") else {
        violations.push(at(path, 1, "the crate's opening has no diagram (a ```text block)"));
        return violations;
    };
    let drawn = opening[start + 1..]
        .iter()
        .take_while(|line| **line != "```")
        .filter(|line| !line.is_empty())
        .count();
    if drawn < 2 {
        violations.push(at(path, start + 1, "the crate's diagram draws nothing"));
    }
    let heading = opening
        .iter()
        .position(|line| line.trim_start_matches('#').trim().trim_end_matches(':') == "Invariants");
    let listed = heading.is_some_and(|at| opening[at + 1..].iter().any(|line| line.starts_with("- ")));
    if !listed {
        violations.push(at(
            path,
            1,
            "the crate's opening has no line `Invariants` with a list below it",
        ));
    }
    violations
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "//! Purpose.\n//!\n//! ```text\n//!  a -> b\n//!  b -> c\n//! ```\n//!\n//! # Invariants\n//! - None moves.\n\npub mod x;\n";

    #[test]
    fn a_good_opening_passes() {
        assert!(check_crate("src/lib.rs", GOOD).is_empty());
    }

    #[test]
    fn each_missing_part_is_found() {
        assert_eq!(check_crate("l", &GOOD.replace("```text", "```")).len(), 1);
        assert_eq!(
            check_crate("l", &GOOD.replace("//!  a -> b\n//!  b -> c\n", "")).len(),
            1
        );
        assert_eq!(check_crate("l", &GOOD.replace("# Invariants", "Notes")).len(), 1);
        assert_eq!(check_crate("l", &GOOD.replace("- None moves.", "")).len(), 1);
        assert_eq!(check_crate("l", "//! Purpose only.\n").len(), 1);
    }

    #[test]
    fn a_file_without_a_purpose_is_found() {
        let file = Tracked {
            path: "a/src/b.rs".into(),
            text: "use std::fmt;\n//! Late.\n".into(),
        };
        assert_eq!(check(&[], &[&file]).len(), 1);
    }
}
