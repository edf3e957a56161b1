//! Where packages come from: this machine's own apt sources, turned to the suite that is built.

use super::{BuildError, Suite};
use crate::process::Run;
use std::collections::BTreeSet;
use std::time::Duration;

const QUERY_DEADLINE: Duration = Duration::from_secs(60);
/// One line a package list that apt knows: whose, where, of which suite.
const FORMAT: &str = "$(ORIGIN)|$(REPO_URI)|$(CODENAME)|$(RELEASE)|$(COMPONENT)";
/// Debian's keys, where its package puts them. Named, because newer suites no longer put them where apt trusts them for all.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The lines of a `sources.list` for `suite`: those of `mirror`, or as this machine's apt has them.
///
/// # Errors
/// When apt knows no archive of Debian's.
pub(crate) fn lines(suite: Suite, mirror: Option<&str>) -> Result<Vec<String>, BuildError> {
    let signed = if std::path::Path::new(KEYRING).exists() {
        format!("[signed-by={KEYRING}] ")
    } else {
        String::new()
    };
    let archives = match mirror {
        Some(mirror) => vec![(checked(mirror)?, suite.codename().to_owned())],
        None => {
            let query = Run::new("apt-get", QUERY_DEADLINE)
                .arg("indextargets")
                .arg("--format")
                .arg(FORMAT)
                .arg("Created-By: Packages");
            let known = query.output().map_err(BuildError::program("ask apt for its sources"))?;
            archives(&String::from_utf8_lossy(&known), suite)
        }
    };
    if archives.is_empty() {
        return Err(BuildError::NoArchive);
    }
    let line = |(uri, suite): (String, String)| format!("deb {signed}{uri} {suite} main");
    Ok(archives.into_iter().map(line).collect())
}

/// A line as it may stand in the image: who this machine is to its mirror is nobody's business there.
pub(crate) fn without_credentials(line: &str) -> String {
    let Some((before, rest)) = line.split_once("://") else {
        return line.to_owned();
    };
    let host_end = rest.find(['/', ' ']).unwrap_or(rest.len());
    match rest[..host_end].rfind('@') {
        Some(at) => format!("{before}://{}", &rest[at + 1..]),
        None => line.to_owned(),
    }
}

/// A mirror's address is one word: in a list of sources a space would begin the next field.
fn checked(mirror: &str) -> Result<String, BuildError> {
    let sound = mirror.contains(":/") && mirror.chars().all(|c| c.is_ascii_graphic());
    if sound && !mirror.starts_with('[') {
        Ok(mirror.to_owned())
    } else {
        Err(BuildError::Mirror(mirror.to_owned()))
    }
}

/// Addresses and suites among what apt knows: those of the suite itself, else those of another, turned to it.
fn archives(known: &str, suite: Suite) -> Vec<(String, String)> {
    let mut own = BTreeSet::new();
    let mut others = BTreeSet::new();
    for line in known.lines() {
        let fields: Vec<&str> = line.split('|').collect();
        let &["Debian", uri, codename, release, "main"] = fields.as_slice() else {
            continue;
        };
        // Lists that were never fetched have no code name: then what the source says.
        let of = if codename.starts_with('$') { release } else { codename };
        let (base, part) = of.split_once('-').map_or((of, ""), |(base, part)| (base, part));
        let turned = match part {
            "" => suite.codename().to_owned(),
            "updates" | "security" => format!("{}-{part}", suite.codename()),
            // Backports and proposed updates are not part of a suite.
            _ => continue,
        };
        let set = if base == suite.codename() {
            &mut own
        } else {
            &mut others
        };
        set.insert((turned, uri.to_owned()));
    }
    let taken = if own.iter().any(|(name, _)| name == suite.codename()) {
        own
    } else {
        others.append(&mut own);
        others
    };
    taken.into_iter().map(|(suite, uri)| (uri, suite)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &str = "\
Debian|http://mirror/debian/|bookworm|bookworm|main
Debian|http://mirror/debian/|bookworm|bookworm|contrib
Debian|http://mirror/debian/|bookworm-updates|bookworm-updates|main
Debian|http://mirror/debian-security/|bookworm-security|bookworm-security|main
Debian Backports|http://mirror/debian/|bookworm-backports|bookworm-backports|main
Debian|http://mirror/debian/|bookworm-proposed-updates|bookworm-proposed-updates|main
Somebody|https://elsewhere/|bookworm|bookworm|main
";

    fn found(known: &str, suite: Suite) -> Vec<String> {
        let join = |(uri, suite): (String, String)| format!("{uri} {suite}");
        archives(known, suite).into_iter().map(join).collect()
    }

    #[test]
    fn debians_own_archives_are_taken_and_turned_to_the_suite() {
        assert_eq!(
            found(KNOWN, Suite::Bookworm),
            [
                "http://mirror/debian/ bookworm",
                "http://mirror/debian-security/ bookworm-security",
                "http://mirror/debian/ bookworm-updates",
            ]
        );
        assert_eq!(
            found(KNOWN, Suite::Trixie),
            [
                "http://mirror/debian/ trixie",
                "http://mirror/debian-security/ trixie-security",
                "http://mirror/debian/ trixie-updates",
            ]
        );
    }

    #[test]
    fn a_suites_own_sources_win_over_others() {
        let both = format!("{KNOWN}Debian|http://near/debian/|trixie|trixie|main\n");
        assert_eq!(found(&both, Suite::Trixie), ["http://near/debian/ trixie"]);
        assert!(found("Ubuntu|http://u/|noble|noble|main\n", Suite::Trixie).is_empty());
    }

    #[test]
    fn passwords_stay_out_of_the_image() {
        let line = "deb [signed-by=/k] https://me:p%40ss@mirror/debian bookworm main";
        assert_eq!(
            without_credentials(line),
            "deb [signed-by=/k] https://mirror/debian bookworm main"
        );
        assert_eq!(without_credentials("deb http://m/d b main"), "deb http://m/d b main");
    }

    #[test]
    fn a_mirror_is_one_word() {
        assert!(checked("http://mirror/debian").is_ok());
        for bad in [
            "http://mirror/debian bookworm contrib",
            "http://m/\ndeb http://x/",
            "mirror",
            "[trusted=yes] http://m/",
        ] {
            assert!(checked(bad).is_err(), "{bad}");
        }
    }
}
