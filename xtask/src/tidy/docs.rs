//! Rules on documents: decisions are numbered and complete, third-party crates have a reason, links lead somewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};
use toml::{Table, Value};

use super::{Tracked, Violation, at};

const ADR_FOLDER: &str = "docs/adr/";
const ADR_SECTIONS: [&str; 3] = ["Context", "Decision", "Consequences"];

/// All that is wrong with the documents.
///
/// # Errors
/// When the workspace's manifest cannot be read.
pub(super) fn check(manifests: &[&Tracked], pages: &[&Tracked], root: &Path) -> Result<Vec<Violation>> {
    let workspace = manifests
        .iter()
        .find(|file| file.path == "Cargo.toml")
        .context("no Cargo.toml at the root")?;
    let decisions: Vec<&Tracked> = pages.iter().copied().filter(|page| is_decision(&page.path)).collect();
    let mut violations = check_decisions(&decisions);
    violations.extend(check_reasons(&third_party(&workspace.text)?, &decisions));
    for page in pages {
        violations.extend(check_links(page, |file| root.join(file).exists(), pages));
    }
    Ok(violations)
}

fn is_decision(path: &str) -> bool {
    path.strip_prefix(ADR_FOLDER).is_some_and(|name| name != "README.md")
}

/// The workspace's dependencies that are not ours.
fn third_party(manifest: &str) -> Result<Vec<String>> {
    let table: Table = manifest.parse().context("Cargo.toml is no TOML")?;
    let dependencies = table
        .get("workspace")
        .and_then(|table| table.get("dependencies"))
        .and_then(Value::as_table);
    let foreign = dependencies
        .into_iter()
        .flatten()
        .filter(|(_, value)| value.get("path").is_none());
    Ok(foreign.map(|(name, _)| name.clone()).collect())
}

/// Numbers are unique, the heading repeats the file's, the three sections are there.
fn check_decisions(decisions: &[&Tracked]) -> Vec<Violation> {
    let mut violations = Vec::new();
    let mut numbers: BTreeMap<&str, &str> = BTreeMap::new();
    for page in decisions {
        let name = page.path.strip_prefix(ADR_FOLDER).unwrap_or(&page.path);
        let number = name
            .get(..4)
            .filter(|number| number.bytes().all(|byte| byte.is_ascii_digit()));
        let Some(number) = number.filter(|_| name.get(4..5) == Some("-")) else {
            violations.push(at(&page.path, 0, "a decision's file is named NNNN-title.md"));
            continue;
        };
        if let Some(other) = numbers.insert(number, &page.path) {
            violations.push(at(&page.path, 0, format!("the number {number} is taken by {other}")));
        }
        if !page.text.starts_with(&format!("# {number}: ")) {
            violations.push(at(&page.path, 1, format!("the first line is `# {number}: title`")));
        }
        for section in ADR_SECTIONS {
            // A section is a heading or a paragraph's bold opening; ten lines leave no room for more form.
            let opens = |line: &str| line == format!("## {section}") || line.starts_with(&format!("**{section}.**"));
            if !page.text.lines().any(opens) {
                violations.push(at(&page.path, 0, format!("no section `**{section}.**`")));
            }
        }
    }
    violations
}

/// Each third-party crate stands in some decision, in backticks.
fn check_reasons(crates: &[String], decisions: &[&Tracked]) -> Vec<Violation> {
    let reasoned = |name: &str| decisions.iter().any(|page| page.text.contains(&format!("`{name}`")));
    let missing = crates.iter().filter(|name| !reasoned(name));
    missing
        .map(|name| {
            at(
                "Cargo.toml",
                0,
                format!("no decision in docs/adr gives the reason for `{name}`"),
            )
        })
        .collect()
}

/// Links to files that are not there, or to headings that the page does not have.
fn check_links(page: &Tracked, exists: impl Fn(&Path) -> bool, pages: &[&Tracked]) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (line, target) in links(&page.text) {
        if target.contains("://") || target.starts_with("mailto:") {
            continue;
        }
        let (file, anchor) = target.split_once('#').unwrap_or((&target, ""));
        let path = if file.is_empty() {
            PathBuf::from(&page.path)
        } else {
            resolve(&page.path, file)
        };
        if !exists(&path) && !file.is_empty() {
            violations.push(at(&page.path, line, format!("the link {target} leads nowhere")));
            continue;
        }
        let other = pages.iter().find(|other| Path::new(&other.path) == path);
        let text = if file.is_empty() {
            Some(page.text.as_str())
        } else {
            other.map(|other| other.text.as_str())
        };
        if !anchor.is_empty() && text.is_some_and(|text| !headings(text).contains(anchor)) {
            violations.push(at(
                &page.path,
                line,
                format!("{} has no heading #{anchor}", path.display()),
            ));
        }
    }
    violations
}

/// Inline links `[text](target)` and definitions `[name]: target`, outside of code.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (index, line) in prose(text) {
        let definition = line
            .strip_prefix('[')
            .and_then(|rest| rest.split_once("]: "))
            .map(|(_, target)| target.trim());
        found.extend(definition.map(|target| (index, target.to_owned())));
        // Every other piece between backticks is code.
        let words: String = line.split('`').step_by(2).collect::<Vec<_>>().join("_");
        let mut rest = words.as_str();
        while let Some((_, after)) = rest.split_once("](") {
            let Some((target, after)) = after.split_once(')') else {
                break;
            };
            found.push((index, target.split(' ').next().unwrap_or(target).to_owned()));
            rest = after;
        }
    }
    found
}

/// Lines outside of fenced blocks, counted from 1.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut fenced = false;
    text.lines().enumerate().filter_map(move |(index, line)| {
        let is_fence = line.trim_start().starts_with("```");
        fenced ^= is_fence;
        (!fenced && !is_fence).then_some((index + 1, line))
    })
}

/// The anchors that a page's headings get: lower case, spaces to hyphens, punctuation dropped.
fn headings(text: &str) -> BTreeSet<String> {
    let titles =
        prose(text).filter_map(|(_, line)| line.strip_prefix('#').map(|rest| rest.trim_start_matches('#').trim()));
    let kept = |c: char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    titles
        .map(|title| {
            title
                .to_lowercase()
                .chars()
                .filter(|&c| kept(c))
                .collect::<String>()
                .replace(' ', "-")
        })
        .collect()
}

/// A link's target relative to the root, `..` resolved by name.
fn resolve(page: &str, target: &str) -> PathBuf {
    let folder = Path::new(page).parent().unwrap_or(Path::new(""));
    let joined = target
        .strip_prefix('/')
        .map_or_else(|| folder.join(target), PathBuf::from);
    let mut path = PathBuf::new();
    for part in joined.components() {
        match part {
            Component::ParentDir => drop(path.pop()),
            Component::CurDir => {}
            other => path.push(other),
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(path: &str, text: &str) -> Tracked {
        Tracked {
            path: path.into(),
            text: text.into(),
        }
    }

    const DECISION: &str = "# 0001: TLS\n\n**Context.** Links.\n\n**Decision.** `rustls`.\n\n**Consequences.** One.\n";

    #[test]
    fn a_complete_decision_passes_and_an_incomplete_one_does_not() {
        assert!(check_decisions(&[&page("docs/adr/0001-tls.md", DECISION)]).is_empty());
        let lacking = DECISION.replace("**Consequences.** One.", "");
        assert_eq!(check_decisions(&[&page("docs/adr/0001-tls.md", &lacking)]).len(), 1);
        assert_eq!(check_decisions(&[&page("docs/adr/0002-tls.md", DECISION)]).len(), 1);
        assert_eq!(check_decisions(&[&page("docs/adr/tls.md", DECISION)]).len(), 1);
    }

    #[test]
    fn two_decisions_with_one_number_are_found() {
        let (one, two) = (
            page("docs/adr/0001-a.md", DECISION),
            page("docs/adr/0001-b.md", DECISION),
        );
        assert_eq!(check_decisions(&[&one, &two]).len(), 1);
    }

    #[test]
    fn a_crate_without_a_reason_is_found_and_ours_need_none() {
        let manifest = "[workspace.dependencies]\nmodel = { path = 'm' }\nrustls = '1'\nrust = '1'\n";
        let crates = third_party(manifest).unwrap();
        assert_eq!(crates.len(), 2);
        let found = check_reasons(&crates, &[&page("docs/adr/0001-tls.md", DECISION)]);
        assert_eq!(found.len(), 1);
        assert!(found[0].to_string().contains("`rust`"), "{found:?}");
    }

    #[test]
    fn links_that_lead_nowhere_are_found() {
        let text = "See [a](../a.md), [b](b.md#part-two), [c](#here), [d](https://example.org/x), `[e](e)`.\n\
                    ```\n[f](f)\n```\n# Here\n[g]: g.md\n";
        let (page, b) = (page("docs/x.md", text), page("docs/b.md", "# Part two!\n"));
        let known = |path: &Path| path == Path::new("a.md") || path == Path::new("docs/b.md");
        let found = check_links(&page, known, &[&b]);
        assert_eq!(found, [at("docs/x.md", 6, "the link g.md leads nowhere")]);
        assert_eq!(check_links(&page, |_| false, &[&b]).len(), 3);
        let renamed = Tracked {
            path: "docs/b.md".into(),
            text: "# Part three\n".into(),
        };
        assert_eq!(check_links(&page, known, &[&renamed]).len(), 2);
    }
}
