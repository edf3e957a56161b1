//! Two people in two projects, through the command line: what is whose, quotas, tokens that end, and what is written down of it.

use anyhow::{Context, Result, ensure};
use e2e::cluster::Ended;
use e2e::fixture::{MEMORY, Shared};
use e2e::suite;
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};

fn main() -> ExitCode {
    suite::main::<Shared>(e2e::cases![two_people_in_two_projects_see_and_do_what_is_theirs])
}

/// Exit codes of `godwit`.
const REFUSED: Option<i32> = Some(1);
const NOT_THERE: Option<i32> = Some(4);

/// A person at a shell of its own.
struct Person<'s> {
    shared: &'s Shared,
    home: tempfile::TempDir,
}

impl<'s> Person<'s> {
    /// Logs in; what follows knows the server and the token from that alone.
    fn login(shared: &'s Shared, name: &str, password: &str) -> Result<Self> {
        let home = tempfile::tempdir()?;
        let person = Person { shared, home };
        let file = person.home.path().join("password");
        std::fs::write(&file, format!("{password}\n"))?;
        let ca = shared.cluster.state().join("ca.pem");
        let (file, ca, server) = (text(&file)?, text(&ca)?, shared.cluster.api());
        person.well(&[
            "login",
            name,
            "--password-file",
            &file,
            "--server",
            &server,
            "--ca",
            &ca,
        ])?;
        Ok(person)
    }

    fn attempt(&self, words: &[&str]) -> Result<Ended> {
        let mut command = self.shared.cluster.command(words);
        for name in ["GODWIT_SERVER", "GODWIT_CA", "GODWIT_TOKEN_FILE"] {
            command.env_remove(name);
        }
        command.env("XDG_CONFIG_HOME", self.home.path()).stdin(Stdio::null());
        Ended::of(&mut command)
    }

    fn well(&self, words: &[&str]) -> Result<String> {
        let ended = self.attempt(words)?;
        ensure!(
            ended.code == Some(0),
            "godwit {}: {}",
            words.join(" "),
            ended.err.trim()
        );
        Ok(ended.out)
    }

    fn ends(&self, words: &[&str], code: Option<i32>, says: &str) -> Result<()> {
        let ended = self.attempt(words)?;
        let fits = ended.code == code && ended.err.contains(says);
        ensure!(
            fits,
            "godwit {} ended with {:?}: {}",
            words.join(" "),
            ended.code,
            ended.err.trim()
        );
        Ok(())
    }
}

fn text(path: &std::path::Path) -> Result<String> {
    path.to_str().map(str::to_owned).context("a path is not UTF-8")
}

fn two_people_in_two_projects_see_and_do_what_is_theirs(shared: &mut Shared) -> Result<()> {
    let place = tempfile::tempdir()?;
    for (user, project, role) in [("alice", "team-a", "project-admin"), ("bob", "team-b", "operator")] {
        let file = place.path().join(user);
        std::fs::write(&file, format!("{user}s own password\n"))?;
        shared.cluster.cli(&["project", "create", project])?;
        let file = text(&file)?;
        let words = [
            "user",
            "create",
            user,
            "--role",
            role,
            "--password-file",
            &file,
            "--project",
            project,
        ];
        shared.cluster.cli(&words)?;
    }
    shared
        .cluster
        .cli(&["project", "quota", "team-a", "--vms", "1", "--disk", "none"])?;
    let alice = Person::login(shared, "alice", "alices own password")?;
    let bob = Person::login(shared, "bob", "bobs own password")?;
    let me = alice.well(&["whoami", "-o", "json"])?;
    ensure!(me.contains("\"team-a\"") && me.contains("\"project-admin\""), "{me}");

    build_template(shared, &alice)?;
    let create = |name| {
        [
            "vm",
            "create",
            name,
            "--template",
            "micro",
            "--memory",
            MEMORY,
            "--wait",
        ]
    };
    alice.well(&create("web1"))?;
    alice.ends(&create("web2"), REFUSED, "may hold 1 VMs")?;
    isolation(&alice, &bob)?;
    tokens(&alice, &place)?;
    bob.ends(&["audit", "export"], REFUSED, "project-admin is needed")?;
    exported(&alice)?;

    alice.well(&["vm", "delete", "web1", "--wait"])?;
    alice.well(&["template", "delete", "micro", "--wait"])?;
    alice.well(&["logout"])?;
    alice.ends(
        &["vm", "list", "--state", &text(alice.home.path())?],
        Some(3),
        "no server keeps its state in",
    )?;
    for (user, project) in [("alice", "team-a"), ("bob", "team-b")] {
        shared.cluster.cli(&["user", "delete", user])?;
        shared.cluster.cli(&["project", "delete", project])?;
    }
    bob.ends(&["vm", "list"], REFUSED, "the token is not valid")
}

/// Builds the micro template in her project, of the parts that the cluster has already.
fn build_template(shared: &Shared, alice: &Person<'_>) -> Result<()> {
    let godwit = std::env::var_os("GODWIT_BIN")
        .map(PathBuf::from)
        .context("GODWIT_BIN is not set")?;
    let target = godwit.canonicalize()?;
    let target = target
        .ancestors()
        .nth(2)
        .context("the program is not in a target directory")?;
    let mut build = shared.cluster.command(&["template", "build", "micro", "--wait"]);
    for name in ["GODWIT_SERVER", "GODWIT_CA", "GODWIT_TOKEN_FILE"] {
        build.env_remove(name);
    }
    build
        .env("XDG_CACHE_HOME", target.join("e2e-cache"))
        .env("XDG_CONFIG_HOME", alice.home.path());
    let built = Ended::of(&mut build)?;
    ensure!(built.code == Some(0), "the template is not built: {}", built.err.trim());
    Ok(())
}

/// What is hers is nowhere for him: neither listed, nor named, nor by its id, nor by naming her project.
fn isolation(alice: &Person<'_>, bob: &Person<'_>) -> Result<()> {
    let seen = alice.well(&["vm", "show", "web1", "-o", "json"])?;
    let vm: serde_json::Value = serde_json::from_str(&seen)?;
    let id = vm["id"].as_str().context("a VM has no id")?.to_owned();
    let none = bob.well(&["vm", "list", "-o", "json"])?;
    ensure!(none.trim() == "[]", "bob sees {none}");
    for words in [
        ["vm", "show", "web1"],
        ["vm", "show", &id],
        ["vm", "kill", &id],
        ["vm", "console", &id],
    ] {
        bob.ends(&words, NOT_THERE, "there is no VM")?;
    }
    bob.ends(
        &["vm", "list", "--project", "team-a"],
        NOT_THERE,
        "there is no project team-a",
    )?;
    bob.ends(
        &["user", "grant", "bob", "project-admin"],
        REFUSED,
        "project-admin is needed",
    )?;
    alice.ends(
        &["project", "quota", "team-a", "--vms", "9"],
        REFUSED,
        "cloud-admin is needed",
    )
}

/// A token does what it was made for, and nothing any more once it is revoked.
fn tokens(alice: &Person<'_>, place: &tempfile::TempDir) -> Result<()> {
    let file = text(&place.path().join("ci.token"))?;
    let made = alice.well(&[
        "token", "create", "ci", "--role", "viewer", "--out", &file, "-o", "json",
    ])?;
    let made: serde_json::Value = serde_json::from_str(&made)?;
    let id = made["id"].as_str().context("a token has no id")?;
    let list = ["vm", "list", "--token-file", &file];
    ensure!(alice.well(&list)?.contains("web1"), "the token sees no VM");
    alice.ends(
        &["vm", "stop", "web1", "--token-file", &file],
        REFUSED,
        "operator is needed",
    )?;
    alice.well(&["token", "revoke", id])?;
    alice.ends(&list, REFUSED, "the token is not valid")
}

/// Her project's log has what was done and refused in it, from where, and nobody's password.
fn exported(alice: &Person<'_>) -> Result<()> {
    let log = alice.well(&["audit", "export", "--format", "jsonl"])?;
    let lines: Vec<serde_json::Value> = log.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    for (action, result) in [
        ("vm.create", "accepted"),
        ("vm.create", "refused"),
        ("token.create", "accepted"),
        ("vm.stop", "refused"),
        ("project.set-quota", "refused"),
    ] {
        let found = lines
            .iter()
            .find(|line| line["action"] == action && line["result"]["result"] == result);
        let found = found.with_context(|| format!("{action} {result} is not in the log:\n{log}"))?;
        ensure!(found["remote"].is_string() && found["token"].is_string(), "{found}");
    }
    ensure!(
        lines.iter().all(|line| line["subject"] != "bob"),
        "what bob did elsewhere is in her log:\n{log}"
    );
    ensure!(!log.contains("password\""), "{log}");
    let csv = alice.well(&["audit", "export", "--format", "csv", "--subject", "alice/ci"])?;
    let mut csv = csv.lines();
    ensure!(
        csv.next().is_some_and(|heading| heading.starts_with("id,time,")),
        "no heading"
    );
    ensure!(
        csv.next().is_some_and(|line| line.contains("\"vm.stop\"")),
        "the token's own deed is missing"
    );
    Ok(())
}
