//! The bill of materials: every crate in the program, in CycloneDX 1.5 (<https://cyclonedx.org/docs/1.5/json/>).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Release;
use crate::run::{capture, cargo, root};

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    source: Option<String>,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<Edge>,
}

#[derive(Deserialize)]
struct Edge {
    pkg: String,
    dep_kinds: Vec<Kind>,
}

#[derive(Deserialize)]
struct Kind {
    /// `None` for what is linked in; `dev` and `build` otherwise.
    kind: Option<String>,
}

#[derive(Deserialize)]
struct Lock {
    package: Vec<Locked>,
}

#[derive(Deserialize)]
struct Locked {
    name: String,
    version: String,
    checksum: Option<String>,
}

/// Writes it.
///
/// # Errors
/// When cargo does not tell what the program is made of.
pub(super) fn write(release: &Release) -> Result<PathBuf> {
    let text = capture(cargo().args([
        "metadata",
        "--locked",
        "--format-version",
        "1",
        "--filter-platform",
        "x86_64-unknown-linux-gnu",
    ]))?;
    let metadata: Metadata = serde_json::from_str(&text).context("cannot read what `cargo metadata` printed")?;
    let lock = fs::read_to_string(root().join("Cargo.lock"))?;
    let lock: Lock = toml::from_str(&lock).context("cannot read Cargo.lock")?;
    let bill = bill(&metadata, &lock, &release.version)?;
    let file = release.out.join(format!("godwit-{}.cdx.json", release.version));
    fs::write(&file, serde_json::to_string_pretty(&bill)? + "\n").context("cannot write the bill of materials")?;
    Ok(file)
}

fn bill(metadata: &Metadata, lock: &Lock, version: &str) -> Result<Value> {
    let edges: BTreeMap<&str, Vec<&str>> = metadata
        .resolve
        .nodes
        .iter()
        .map(|node| (&*node.id, linked(node)))
        .collect();
    let program = metadata.packages.iter().find(|package| package.name == "godwit");
    let program = program.context("there is no package `godwit`")?;
    let mut inside = BTreeSet::new();
    let mut next = vec![&*program.id];
    while let Some(id) = next.pop() {
        if inside.insert(id) {
            next.extend(edges.get(id).into_iter().flatten());
        }
    }
    let sums: BTreeMap<(&str, &str), &str> = lock
        .package
        .iter()
        .filter_map(|one| Some(((&*one.name, &*one.version), one.checksum.as_deref()?)))
        .collect();
    let strangers = metadata
        .packages
        .iter()
        .filter(|one| inside.contains(&*one.id) && one.source.is_some());
    let components: Vec<Value> = strangers
        .map(|one| component(one, sums.get(&(&*one.name, &*one.version)).copied()))
        .collect();
    Ok(json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": { "component": {
            "type": "application",
            "name": "godwit",
            "version": version,
            "purl": format!("pkg:cargo/godwit@{version}"),
            "licenses": [{ "expression": "Apache-2.0" }],
        }},
        "components": components,
    }))
}

/// What a crate links in; what only its tests or its build script need is not in the program.
fn linked(node: &Node) -> Vec<&str> {
    let links = |edge: &&Edge| edge.dep_kinds.iter().any(|kind| kind.kind.is_none());
    node.deps.iter().filter(links).map(|edge| &*edge.pkg).collect()
}

fn component(package: &Package, sum: Option<&str>) -> Value {
    let purl = format!("pkg:cargo/{}@{}", package.name, package.version);
    let mut component = json!({
        "type": "library",
        "bom-ref": purl,
        "name": package.name,
        "version": package.version,
        "purl": purl,
    });
    if let Some(license) = &package.license {
        // Old crates write `MIT/Apache-2.0`, which SPDX does not know.
        component["licenses"] = json!([{ "expression": license.replace('/', " OR ") }]);
    }
    if let Some(sum) = sum {
        component["hashes"] = json!([{ "alg": "SHA-256", "content": sum }]);
    }
    component
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bill_has_what_is_linked_in_and_nothing_else() {
        let package = |name: &str, source: Option<&str>| json!({ "id": name, "name": name, "version": "1.0.0", "license": "MIT/Apache-2.0", "source": source });
        let edge = |pkg: &str, kind: Option<&str>| json!({ "pkg": pkg, "dep_kinds": [{ "kind": kind }] });
        let metadata = json!({
            "packages": [package("godwit", None), package("model", None), package("serde", Some("r")), package("tempfile", Some("r")), package("cc", Some("r"))],
            "resolve": { "nodes": [
                { "id": "godwit", "deps": [edge("model", None), edge("tempfile", Some("dev"))] },
                { "id": "model", "deps": [edge("serde", None), edge("cc", Some("build"))] },
            ]},
        });
        let metadata: Metadata = serde_json::from_value(metadata).unwrap();
        let lock = Lock {
            package: vec![Locked {
                name: "serde".into(),
                version: "1.0.0".into(),
                checksum: Some("ab".into()),
            }],
        };
        let bill = bill(&metadata, &lock, "0.1.0").unwrap();
        assert_eq!(bill["components"].as_array().unwrap().len(), 1);
        let serde = &bill["components"][0];
        assert_eq!(serde["purl"], "pkg:cargo/serde@1.0.0");
        assert_eq!(serde["licenses"][0]["expression"], "MIT OR Apache-2.0");
        assert_eq!(serde["hashes"][0]["content"], "ab");
    }
}
