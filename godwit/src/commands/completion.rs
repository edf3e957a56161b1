//! `godwit completion`: the shell's scripts, and the names that complete by asking the server.

use std::{
    ffi::{OsStr, OsString},
    path::PathBuf,
    time::Duration,
};

use clap::{Args, ValueEnum};
use clap_complete::{
    CompletionCandidate,
    env::{Bash, EnvCompleter, Fish, Zsh},
};
use serde_json::Value;

use crate::{
    client::{
        Client,
        locate::{Flags, locate},
    },
    exit::Failure,
    out,
};

/// Longest wait for names: whoever pressed the key waits too.
const ANSWER_MAX: Duration = Duration::from_millis(800);

/// Most names that are offered.
const NAMES_MAX: usize = 500;

/// Print the script that completes commands and names in a shell.
#[derive(Args, Debug)]
pub(crate) struct Completion {
    /// The shell. Then: `source <(godwit completion bash)`
    shell: Shell,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

impl Completion {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let shell: &dyn EnvCompleter = match self.shell {
            Shell::Bash => &Bash,
            Shell::Zsh => &Zsh,
            Shell::Fish => &Fish,
        };
        out::text(&script(shell)?)
    }
}

/// What a shell reads to complete by asking this program.
pub(super) fn script(shell: &dyn EnvCompleter) -> Result<String, Failure> {
    let mut script = Vec::new();
    let written = shell.write_registration("COMPLETE", "godwit", "godwit", "godwit", &mut script);
    written.map_err(|error| Failure::output(&error))?;
    Ok(String::from_utf8_lossy(&script).into_owned())
}

/// Names of VMs.
pub(crate) fn vms(current: &OsStr) -> Vec<CompletionCandidate> {
    offered(current, "/v1/vms", |item| item["name"].as_str())
}

/// Names of hosts.
pub(crate) fn hosts(current: &OsStr) -> Vec<CompletionCandidate> {
    offered(current, "/v1/hosts", |item| item["name"].as_str())
}

/// Names of templates.
pub(crate) fn templates(current: &OsStr) -> Vec<CompletionCandidate> {
    offered(current, "/v1/templates", |item| item["name"].as_str())
}

/// Names of projects.
pub(crate) fn projects(current: &OsStr) -> Vec<CompletionCandidate> {
    offered(current, "/v1/projects", |item| item["name"].as_str())
}

/// Names of users.
pub(crate) fn users(current: &OsStr) -> Vec<CompletionCandidate> {
    offered(current, "/v1/users", |item| item["name"].as_str())
}

/// Ids of service tokens.
pub(crate) fn tokens(current: &OsStr) -> Vec<CompletionCandidate> {
    offered(current, "/v1/tokens", |item| item["id"].as_str())
}

/// Names of networks.
pub(crate) fn networks(current: &OsStr) -> Vec<CompletionCandidate> {
    offered(current, "/v1/networks", |item| item["name"].as_str())
}

/// Names of security groups.
pub(crate) fn security_groups(current: &OsStr) -> Vec<CompletionCandidate> {
    offered(current, "/v1/security-groups", |item| item["name"].as_str())
}

/// Names of pools.
pub(crate) fn pools(current: &OsStr) -> Vec<CompletionCandidate> {
    offered(current, "/v1/pools", |item| item["name"].as_str())
}

/// Ids of operations that are not over.
pub(crate) fn running(current: &OsStr) -> Vec<CompletionCandidate> {
    offered(current, "/v1/operations", |item| {
        item["id"].as_str().filter(|_| item["finished_at"].is_null())
    })
}

/// Ids of operations.
pub(crate) fn operations(current: &OsStr) -> Vec<CompletionCandidate> {
    offered(current, "/v1/operations", |item| item["id"].as_str())
}

/// What a list has that begins so. Nothing where the server does not answer at once: a prompt is no place for errors.
fn offered(current: &OsStr, path: &str, name: fn(&Value) -> Option<&str>) -> Vec<CompletionCandidate> {
    let begun = current.to_str().unwrap_or_default();
    let items = asked(path).unwrap_or_default();
    let names = items.iter().filter_map(name).filter(|name| name.starts_with(begun));
    // What a shell would take for more than a word is not offered.
    let plain = names.filter(|name| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'));
    plain.map(CompletionCandidate::new).collect()
}

fn asked(path: &str) -> Option<Vec<Value>> {
    let words: Vec<OsString> = std::env::args_os().collect();
    let server = locate(&flags(&words), |name| std::env::var_os(name)).ok()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .ok()?;
    let names = runtime.block_on(async {
        let client = Client::new(server);
        tokio::time::timeout(ANSWER_MAX, client.list(path, NAMES_MAX))
            .await
            .ok()?
            .ok()
    });
    runtime.shutdown_background();
    names
}

/// What the unfinished command line says of the server.
fn flags(words: &[OsString]) -> Flags {
    let value = |flag: &str| {
        let at = words.iter().position(|word| word == flag)?;
        words.get(at + 1).cloned()
    };
    Flags {
        state: value("--state").map(PathBuf::from),
        server: value("--server").and_then(|server| server.into_string().ok()),
        ca: value("--ca").map(PathBuf::from),
        token_file: value("--token-file").map(PathBuf::from),
        project: value("--project").and_then(|project| project.to_str()?.parse().ok()),
    }
}
