//! Which room may know which: the allowed dependency edges between our crates, with their reasons.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use toml::{Table, Value};

use super::{Tracked, Violation, at};

/// One crate, where it lives, and which of ours it may depend on.
struct Room {
    name: &'static str,
    folder: &'static str,
    may: &'static [&'static str],
    why: &'static str,
}

const fn room(name: &'static str, folder: &'static str, may: &'static [&'static str], why: &'static str) -> Room {
    Room { name, folder, may, why }
}

/// The whole house, in the order of the data path. A new edge is a line here and an ADR.
const ROOMS: &[Room] = &[
    room(
        "rest",
        "edge/rest",
        &["model", "wire", "controller", "identity"],
        "the edge translates: nouns and problems in, the controller's handle out; never a host (its tests join one with identity)",
    ),
    room("model", "control/model", &[], "nouns depend on nothing"),
    room(
        "engine",
        "control/engine",
        &["model", "handover"],
        "decisions are pure; arbitration lives in handover",
    ),
    room(
        "store",
        "control/store",
        &["model"],
        "it remembers nouns and does not decide",
    ),
    room(
        "controller",
        "control/controller",
        &["engine", "store", "wire", "identity", "model", "handover"],
        "the loop joins decision, memory and dispatch; it never acts on a host",
    ),
    room(
        "wire",
        "link/wire",
        &["model", "handover"],
        "the serialised forms of nouns and of hand-over messages",
    ),
    room("identity", "link/identity", &["model"], "certificates carry ids"),
    room(
        "handover",
        "link/handover",
        &["model"],
        "pure step functions over nouns",
    ),
    room(
        "agent",
        "host/agent",
        &[
            "task", "driver", "handover", "qemu", "image", "network", "services", "wire", "identity", "model",
        ],
        "the shell on a host: everything that acts, nothing that decides",
    ),
    room(
        "task",
        "host/task",
        &["model", "handover", "driver"],
        "one VM as a state machine: speaks of the driver, calls it never",
    ),
    room("driver", "host/driver", &["model"], "the interface knows no hypervisor"),
    room("qemu", "host/qemu", &["driver", "qmp", "model"], "the first driver"),
    room("qmp", "host/qmp", &[], "a codec that knows no VMs"),
    room("image", "host/image", &["model"], "disks and templates"),
    room("network", "host/network", &["model"], "bridges and ports"),
    room(
        "services",
        "host/services",
        &["model"],
        "what guests ask their host, answered out of nouns; frames come and go by the agent",
    ),
    room("sim", "proof/sim", ANY, "proof sees everything"),
    room("e2e", "proof/e2e", ANY, "proof sees everything"),
    room("bench", "proof/bench", ANY, "proof sees everything"),
    room(
        "godwit",
        "godwit",
        &[
            "rest",
            "model",
            "engine",
            "store",
            "controller",
            "wire",
            "identity",
            "handover",
            "agent",
            "task",
            "driver",
            "qemu",
            "qmp",
            "image",
            "network",
        ],
        "the binary joins the rooms; only proof stays out of it",
    ),
    room("xtask", "xtask", &[], "it builds first, on a machine that has nothing"),
];

/// Any of ours.
const ANY: &[&str] = &["*"];

/// Crates whose code runs in production, in the simulator and under fault injection alike, so a seed replays any bug.
const PURE: [&str; 4] = ["model", "engine", "handover", "task"];

/// What pure crates may use from others: data and derives, nothing that reaches the world.
const PURE_MAY: [&str; 6] = ["serde", "serde_json", "thiserror", "uuid", "utoipa", "time"];

/// The types that clippy has to refuse in pure crates, whatever else it refuses there.
const PURE_WITHOUT: [&str; 5] = [
    "std::collections::HashMap",
    "std::collections::HashSet",
    "std::time::Instant",
    "std::time::SystemTime",
    "std::fs::File",
];

/// One of our crates as its manifest describes it.
pub(super) struct Crate {
    pub(super) name: String,
    /// Relative to the root.
    pub(super) folder: String,
    dependencies: BTreeMap<String, Value>,
    dev_dependencies: BTreeMap<String, Value>,
}

/// Reads the manifests of the workspace's members.
///
/// # Errors
/// When one of them is no TOML or names no package.
pub(super) fn crates(manifests: &[&Tracked]) -> Result<Vec<Crate>> {
    let members = manifests.iter().filter(|file| file.path != "Cargo.toml");
    members
        .map(|file| parse(&file.path, &file.text).with_context(|| format!("cannot read {}", file.path)))
        .collect()
}

fn parse(path: &str, text: &str) -> Result<Crate> {
    let table: Table = text.parse()?;
    let name = table
        .get("package")
        .and_then(|package| package.get("name"))
        .and_then(Value::as_str);
    let mut tables = vec![&table];
    if let Some(targets) = table.get("target").and_then(Value::as_table) {
        tables.extend(targets.values().filter_map(Value::as_table));
    }
    let gather = |kinds: &[&str]| {
        let pairs = kinds
            .iter()
            .flat_map(|kind| tables.iter().filter_map(|table| table.get(*kind)?.as_table()));
        pairs
            .flatten()
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect()
    };
    Ok(Crate {
        name: name.context("no package.name")?.to_owned(),
        folder: path.trim_end_matches("/Cargo.toml").to_owned(),
        dependencies: gather(&["dependencies", "build-dependencies"]),
        dev_dependencies: gather(&["dev-dependencies"]),
    })
}

/// Edges that are not in the table, crates that are not in it, and versions that are not the workspace's.
pub(super) fn check(crates: &[Crate]) -> Vec<Violation> {
    let mut violations = Vec::new();
    for one in crates {
        let file = format!("{}/Cargo.toml", one.folder);
        let Some(room) = ROOMS
            .iter()
            .find(|room| room.name == one.name && room.folder == one.folder)
        else {
            violations.push(at(
                &file,
                0,
                format!("{} in {} is not in xtask's table of rooms", one.name, one.folder),
            ));
            continue;
        };
        let allowed = |name: &str| room.may == ANY || room.may.contains(&name);
        for name in one.dependencies.keys().filter(|name| is_ours(name) && !allowed(name)) {
            violations.push(at(
                &file,
                0,
                format!("{} may not depend on {name}: {}", one.name, room.why),
            ));
        }
        let proof = |name: &str| {
            ROOMS
                .iter()
                .any(|room| room.name == name && room.folder.starts_with("proof/"))
        };
        for name in one
            .dev_dependencies
            .keys()
            .filter(|name| is_ours(name) && !allowed(name) && !proof(name))
        {
            violations.push(at(
                &file,
                0,
                format!("tests of {} may not depend on {name}: {}", one.name, room.why),
            ));
        }
        for (name, value) in one.dependencies.iter().chain(&one.dev_dependencies) {
            if value.get("workspace").and_then(Value::as_bool) != Some(true) {
                violations.push(at(
                    &file,
                    0,
                    format!("{name} needs `workspace = true`: one version, one reason, one place"),
                ));
            }
        }
    }
    violations
}

/// Pure crates that lack their list of disallowed types, or use a crate that reaches the world. `text` gives a tracked
/// file's text by its path.
pub(super) fn check_pure<'a>(crates: &[Crate], text: impl Fn(&str) -> Option<&'a str>) -> Vec<Violation> {
    let mut violations = Vec::new();
    for one in crates.iter().filter(|one| PURE.contains(&one.name.as_str())) {
        let lints = format!("{}/clippy.toml", one.folder);
        let listed = disallowed(text(&lints).unwrap_or_default());
        for name in PURE_WITHOUT
            .iter()
            .filter(|name| !listed.iter().any(|one| one == *name))
        {
            violations.push(at(&lints, 0, format!("a pure crate disallows the type {name}")));
        }
        let foreign = one
            .dependencies
            .keys()
            .filter(|name| !is_ours(name) && !PURE_MAY.contains(&name.as_str()));
        for name in foreign {
            let what = format!(
                "{} is pure and may not use {name}: times, ids and chance arrive as values",
                one.name
            );
            violations.push(at(&format!("{}/Cargo.toml", one.folder), 0, what));
        }
    }
    violations
}

/// The paths below `disallowed-types` of a `clippy.toml`.
fn disallowed(text: &str) -> Vec<String> {
    let table: Table = text.parse().unwrap_or_default();
    let entries = table
        .get("disallowed-types")
        .and_then(Value::as_array)
        .into_iter()
        .flatten();
    let path = |entry: &Value| entry.get("path").unwrap_or(entry).as_str().map(str::to_owned);
    entries.filter_map(path).collect()
}

fn is_ours(name: &str) -> bool {
    ROOMS.iter().any(|room| room.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<String> {
        check(&[parse(path, text).unwrap()])
            .iter()
            .map(Violation::to_string)
            .collect()
    }

    #[test]
    fn an_edge_that_is_not_in_the_table_is_found() {
        let text = "[package]\nname = 'controller'\n[dependencies]\nagent.workspace = true\nengine.workspace = true\n";
        let found = found("control/controller/Cargo.toml", text);
        assert_eq!(found.len(), 1);
        assert!(
            found[0].starts_with("control/controller/Cargo.toml: controller may not depend on agent:"),
            "{found:?}"
        );
    }

    #[test]
    fn edges_hide_neither_in_build_nor_in_target_dependencies() {
        let head = "[package]\nname = 'store'\n";
        for table in [
            "build-dependencies",
            "target.'cfg(unix)'.dependencies",
            "dev-dependencies",
        ] {
            let text = format!("{head}[{table}]\nengine.workspace = true\n");
            assert_eq!(found("control/store/Cargo.toml", &text).len(), 1, "{table}");
        }
    }

    #[test]
    fn only_tests_may_point_at_proof() {
        let text = |table: &str| format!("[package]\nname = 'engine'\n[{table}]\nsim.workspace = true\n");
        assert_eq!(found("control/engine/Cargo.toml", &text("dependencies")).len(), 1);
        assert!(found("control/engine/Cargo.toml", &text("dev-dependencies")).is_empty());
    }

    #[test]
    fn a_room_that_nobody_planned_or_that_moved_is_found() {
        assert_eq!(found("edge/ftp/Cargo.toml", "[package]\nname = 'ftp'\n").len(), 1);
        assert_eq!(found("host/model/Cargo.toml", "[package]\nname = 'model'\n").len(), 1);
        assert!(found("control/model/Cargo.toml", "[package]\nname = 'model'\n").is_empty());
    }

    #[test]
    fn a_version_of_its_own_is_found() {
        let text = "[package]\nname = 'model'\n[dependencies]\nserde = '1'\n";
        assert_eq!(found("control/model/Cargo.toml", text).len(), 1);
    }

    #[test]
    fn a_pure_crate_reaches_nothing() {
        let text = "[package]\nname = 'engine'\n[dependencies]\ntokio.workspace = true\nserde.workspace = true\n";
        let one = [parse("control/engine/Cargo.toml", text).unwrap()];
        let lints = include_str!("../../../control/engine/clippy.toml");
        assert_eq!(check_pure(&one, |_| Some(lints)).len(), 1);
        let shorter = lints.replace("std::time::Instant\"", "std::time::Other\"");
        assert_eq!(check_pure(&one, |_| Some(&shorter)).len(), 2);
        assert_eq!(check_pure(&one, |_| None).len(), 1 + PURE_WITHOUT.len());
    }
}
