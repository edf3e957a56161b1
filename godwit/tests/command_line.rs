//! The binary as people and scripts meet it: a real controller process, the command line against it, and how commands end.

#![allow(clippy::unwrap_used)] // a test fails by panicking, its helpers too

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead as _, BufReader, Read as _},
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open},
};
use serde_json::Value;

const GODWIT: &str = env!("CARGO_BIN_EXE_godwit");

/// A controller process on free ports of the loopback.
struct Controller {
    child: Child,
    api: String,
    directory: tempfile::TempDir,
}

impl Controller {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (child, line) = spawn(&directory.path().join("state"));
        let api = line
            .strip_prefix("ready api=")
            .unwrap()
            .split(' ')
            .next()
            .unwrap()
            .to_owned();
        assert!(
            api.starts_with("https://127.0.0.1:") && line.contains(" agents=127.0.0.1:"),
            "{line}"
        );
        Self { child, api, directory }
    }

    fn state(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    fn run(&self, words: &[&str]) -> Output {
        command().arg("--state").arg(self.state()).args(words).output().unwrap()
    }

    /// Runs a command that must end with this code; what it printed, and what it said.
    fn ends(&self, words: &[&str], code: i32) -> (String, String) {
        let output = self.run(words);
        let (printed, said) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{words:?}: {printed}{said}");
        assert!(code == 0 || said.starts_with("error: "), "{words:?}: {said}");
        assert!(
            !said.contains("panicked") && !said.contains("Os {"),
            "{words:?}: {said}"
        );
        (printed, said)
    }

    fn json(&self, words: &[&str]) -> Value {
        let (printed, _) = self.ends(&[words, &["-o", "json"]].concat(), 0);
        serde_json::from_str(&printed).unwrap()
    }

    /// Lets a host join, as an agent does; its agent never runs.
    fn join(&self, name: &str) {
        let join = self.json(&["host", "add-token"])["join"].as_str().unwrap().to_owned();
        let config = agent::AgentConfig {
            state_dir: self.directory.path().join(name),
            run_dir: self.directory.path().join("run"),
            address: [127, 0, 0, 1].into(),
            pools: Vec::new(),
            bridge: "godwit0".parse().unwrap(),
            uplink: None,
            gateway: None,
            mtu: 1500,
            qemu: "qemu-system-x86_64".into(),
            exe: GODWIT.into(),
        };
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime
            .block_on(agent::join(&config, &join.parse().unwrap(), &name.parse().unwrap()))
            .unwrap();
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(state: &Path) -> (Child, String) {
    let mut child = command()
        .args([
            "controller",
            "--listen",
            "127.0.0.1:0",
            "--agent-listen",
            "127.0.0.1:0",
            "--state",
        ])
        .arg(state)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    (child, line)
}

/// The binary with nothing of this machine's own clients.
fn command() -> Command {
    let mut command = Command::new(GODWIT);
    command
        .env_clear()
        .env("HOME", "/nonexistent")
        .env("GODWIT_LOG", "error")
        .stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn every_way_of_ending_has_its_code_and_says_what_to_do() {
    let controller = Controller::start();
    assert_eq!(controller.ends(&["vm", "list"], 0).1, "");
    controller.ends(&["vm", "show", "web1"], 4);
    let (_, said) = controller.ends(&["vm", "create", "web1", "--template", "none"], 4);
    assert!(said.contains("  next: "), "{said}");
    let (_, said) = controller.ends(&["vm", "delete", "web1", "--wait"], 0);
    assert!(said.contains("not there"), "{said}");
    assert_eq!(controller.ends(&["vm", "delete", "web1", "-o", "json"], 0).0, "null\n");
    controller.ends(&["op", "show", "0197b2a0-0000-7000-8000-000000000000"], 4);
    assert_eq!(
        controller
            .run(&["vm", "create", "UPPER", "--template", "t"])
            .status
            .code(),
        Some(2)
    );

    let (_, said) = controller.ends(&["--server", "https://127.0.0.1:1", "vm", "list"], 3);
    assert!(
        said.contains("127.0.0.1:1") && said.contains("refused") && said.contains("--server"),
        "{said}"
    );
    let other = Controller::start();
    let ca = other.state().join("ca.pem");
    let (_, said) = controller.ends(&["--ca", ca.to_str().unwrap(), "vm", "list"], 3);
    assert!(said.contains("not the server of this authority"), "{said}");
    let token = other.state().join("admin.token");
    let (_, said) = controller.ends(&["--token-file", token.to_str().unwrap(), "vm", "list"], 1);
    assert!(said.contains("token") && said.contains("admin.token"), "{said}");
}

#[test]
fn a_host_comes_and_goes_by_the_command_line() {
    let controller = Controller::start();
    controller.join("h1");
    assert_eq!(controller.json(&["host", "list"])[0]["name"], "h1");
    let (shown, _) = controller.ends(&["host", "show", "h1"], 0);
    assert!(shown.contains("state:        lost"), "{shown}");
    assert_eq!(
        controller.json(&["host", "set", "h1", "--schedulable", "false"])["spec"]["schedulable"],
        false
    );
    let (printed, _) = controller.ends(&["events"], 0);
    assert!(
        printed.contains("host.joined") && printed.contains("host h1"),
        "{printed}"
    );
    let operation = controller.json(&["host", "remove", "h1", "--wait"]);
    assert_eq!(operation["state"]["state"], "succeeded");
    let id = operation["id"].as_str().unwrap();
    assert!(controller.ends(&["op", "wait", id], 0).0.contains("remove-host"));
    controller.ends(&["op", "cancel", id], 5);
    let (_, said) = controller.ends(&["host", "remove", "h1"], 0);
    assert!(said.contains("not there"), "{said}");
    let last = controller
        .ends(&["events", "-o", "json"], 0)
        .0
        .lines()
        .last()
        .unwrap()
        .to_owned();
    let last: Value = serde_json::from_str(&last).unwrap();
    let after = last["data"]["sequence"].to_string();
    assert_eq!(controller.ends(&["events", "--after", &after], 0).0, "");
}

#[test]
fn names_complete_by_asking_the_server_and_silence_answers_errors() {
    let controller = Controller::start();
    controller.join("h1");
    controller.join("other");
    let complete = |state: &Path, begun: &str| {
        let output = command()
            .env("COMPLETE", "bash")
            .env("_CLAP_COMPLETE_INDEX", "5")
            .env("_CLAP_IFS", "\n")
            .args(["--", "godwit", "--state"])
            .arg(state)
            .args(["host", "show", begun])
            .output()
            .unwrap();
        assert_eq!(text(&output.stderr), "");
        text(&output.stdout)
    };
    assert!(complete(&controller.state(), "").contains("h1\n"));
    assert_eq!(complete(&controller.state(), "ot").trim(), "other");
    let empty = tempfile::tempdir().unwrap();
    assert_eq!(complete(empty.path(), "h"), "");
    let script = text(&command().args(["completion", "bash"]).output().unwrap().stdout);
    assert!(
        script.contains("COMPLETE=\"bash\"") && script.contains("godwit"),
        "{script}"
    );
}

#[test]
fn without_a_server_it_says_where_it_looked() {
    // A machine that runs a controller of its own finds that one.
    if Path::new("/var/lib/godwit/controller/client.json").exists() {
        return;
    }
    let output = command().args(["vm", "list"]).output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{said}");
    for place in [
        "--server",
        "GODWIT_SERVER",
        "/nonexistent/.config/godwit/client.json",
        "/var/lib/godwit",
    ] {
        assert!(said.contains(place), "{place}: {said}");
    }
}

#[test]
fn results_come_as_tables_json_and_yaml() {
    let controller = Controller::start();
    let (table, _) = controller.ends(&["network", "list"], 0);
    assert!(
        table.starts_with("NAME") && table.contains("default") && table.contains("10.91.0.0/24"),
        "{table}"
    );
    assert!(
        controller
            .ends(&["network", "list", "-o", "wide"], 0)
            .0
            .lines()
            .next()
            .unwrap()
            .ends_with("ID")
    );
    let json = controller.json(&["network", "list"]);
    assert_eq!(json[0]["name"], "default");
    let yaml: Value = serde_yaml_ng::from_str(&controller.ends(&["-o", "yaml", "network", "list"], 0).0).unwrap();
    assert_eq!(yaml, json);
    let token = controller.json(&["host", "add-token"]);
    let address = controller.api.strip_prefix("https://").unwrap();
    assert_eq!(token["join"], format!("{}@{address}", token["token"].as_str().unwrap()));
}

#[test]
fn the_environment_leads_to_the_server() {
    let controller = Controller::start();
    let state = controller.state();
    let output = command()
        .args(["host", "list"])
        .env("GODWIT_SERVER", &controller.api)
        .env("GODWIT_CA", state.join("ca.pem"))
        .env("GODWIT_TOKEN_FILE", state.join("admin.token"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
}

#[test]
fn a_token_file_that_others_can_read_is_refused() {
    let controller = Controller::start();
    let token = controller.state().join("admin.token");
    fs::set_permissions(&token, fs::Permissions::from_mode(0o644)).unwrap();
    let (_, said) = controller.ends(&["vm", "list"], 1);
    assert!(said.contains("open to other users") && said.contains("0644"), "{said}");
}

#[test]
fn an_argument_that_is_not_utf8_is_refused_with_one_line() {
    let output = command()
        .arg("vm")
        .arg("show")
        .arg(OsStr::from_bytes(b"\xff\xfe"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = text(&output.stderr);
    assert!(said.starts_with("error: argument 3 is not UTF-8"), "{said}");
}

#[test]
fn a_closed_output_ends_a_command_quietly() {
    let controller = Controller::start();
    for words in [&["network", "list"][..], &["completion", "bash"], &["--help"]] {
        let mut child = command()
            .arg("--state")
            .arg(controller.state())
            .args(words)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(child.wait().unwrap().success(), "{words:?}: {said}");
        assert_eq!(said, "", "{words:?}");
    }
}

#[test]
fn a_controller_ends_well_when_told_and_keeps_what_it_knew() {
    let mut controller = Controller::start();
    controller.join("h1");
    let token = fs::read(controller.state().join("admin.token")).unwrap();
    kill_process(Pid::from_child(&controller.child), Signal::TERM).unwrap();
    let process = pidfd_open(Pid::from_child(&controller.child), PidfdFlags::empty()).unwrap();
    let limit = Timespec { tv_sec: 20, tv_nsec: 0 };
    let ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit)).unwrap();
    assert_eq!(ended, 1, "it did not stop");
    let status = controller.child.wait().unwrap();
    assert!(status.success(), "{status}");
    let (again, line) = spawn(&controller.state());
    controller.child = again;
    assert!(line.starts_with("ready "), "{line}");
    assert_eq!(fs::read(controller.state().join("admin.token")).unwrap(), token);
    assert_eq!(controller.json(&["host", "list"])[0]["name"], "h1");
}

#[test]
fn a_port_that_is_taken_and_a_network_that_cannot_be_are_refused() {
    let controller = Controller::start();
    let taken = controller.api.strip_prefix("https://").unwrap();
    let run = |words: &[&str]| {
        let state = tempfile::tempdir().unwrap();
        let output = command()
            .args(["controller", "--agent-listen", "127.0.0.1:0", "--state"])
            .arg(state.path())
            .args(words)
            .output();
        let output = output.unwrap();
        (output.status.code(), text(&output.stderr))
    };
    let (code, said) = run(&["--listen", taken]);
    assert!(code == Some(1) && said.contains("cannot listen on"), "{said}");
    let (code, said) = run(&["--listen", "127.0.0.1:0", "--subnet", "10.91.0.1/24"]);
    assert!(code == Some(1) && said.contains("10.91.0.0/24"), "{said}");
    let (code, said) = run(&["--listen", "127.0.0.1:0", "--frobnicate"]);
    assert!(code == Some(2) && said.contains("--frobnicate"), "{said}");
}

#[test]
fn an_agent_that_has_not_joined_says_how_to() {
    let state = tempfile::tempdir().unwrap();
    let pool = format!("local={}", state.path().display());
    let output = command()
        .args(["agent", "--pool", &pool, "--state"])
        .arg(state.path())
        .output()
        .unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(
        said.contains("godwit host add-token") && said.contains("--join"),
        "{said}"
    );
    for words in [
        &["agent", "--join", "gwj1.hush@127.0.0.1:1"][..],
        &["agent", "gwj1.hush@127.0.0.1:1"],
    ] {
        let output = command().args(words).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        let said = text(&output.stderr);
        assert!(
            !said.contains("hush") && said.contains("gwj1."),
            "a secret is not told on: {said}"
        );
    }
}

#[test]
fn a_pool_that_is_not_there_is_not_made() {
    let state = tempfile::tempdir().unwrap();
    let place = state.path().join("not-mounted");
    let output = command()
        .args(["agent", "--pool", &format!("shared={}", place.display()), "--state"])
        .arg(state.path())
        .output()
        .unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("mkdir -p {}", place.display())), "{said}");
    assert!(!place.exists());
}

#[test]
fn a_server_takes_no_options_of_clients() {
    for words in [
        "--server https://h:1 up",
        "up --server https://h:1",
        "controller --ca f",
        "agent --token-file f",
        "up -o json",
    ] {
        let output = command().args(words.split(' ')).output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("commands that ask a server"), "{said}");
    }
    let help = text(&command().args(["agent", "--help"]).output().unwrap().stdout);
    let (own, global) = help.split_once("Global options:").unwrap();
    assert!(own.contains("--join") && own.contains("--pool"), "{help}");
    assert!(global.contains("--state") && !help.contains("--token-file"), "{help}");
    let help = text(&command().args(["vm", "list", "--help"]).output().unwrap().stdout);
    assert!(help.contains("--token-file"), "{help}");
}

#[test]
fn a_tunnel_that_is_not_called_by_an_agent_says_so_at_once() {
    for words in [&["tunnel"][..], &["tunnel", "--spec"], &["tunnel", "--help"]] {
        assert_eq!(
            command().args(words).output().unwrap().status.code(),
            Some(2),
            "{words:?}"
        );
    }
    let output = command()
        .args(["tunnel", "--spec", "/nonexistent/spec"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("/nonexistent/spec"),
        "{}",
        text(&output.stderr)
    );
}
