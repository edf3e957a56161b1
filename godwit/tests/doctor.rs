//! `godwit doctor` as people and scripts meet it: on this machine as it is, for a directory where nothing is yet.

#![allow(clippy::unwrap_used)] // a test fails by panicking, its helpers too

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::{Command, Output},
    time::{Duration, Instant},
};

use serde_json::Value;

/// The promise is 5 s; starting and ending a process on a machine under load comes on top.
const TIME_MAX: Duration = Duration::from_secs(10);

fn doctor(state: &Path, words: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_godwit"));
    // Neither this user's own configuration nor the machine's is looked at.
    for name in ["GODWIT_SERVER", "GODWIT_CA", "GODWIT_TOKEN_FILE", "XDG_CONFIG_HOME"] {
        command.env_remove(name);
    }
    command.env("HOME", state).env("LANG", "C.UTF-8").env_remove("LC_ALL");
    command
        .arg("--state")
        .arg(state)
        .arg("doctor")
        .args(words)
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn all_that_is_known_of_a_machine_comes_as_json_in_time_and_nothing_stays() {
    let state = tempfile::tempdir().unwrap();
    let scratches = || {
        let entries = fs::read_dir(std::env::temp_dir()).unwrap().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names
            .filter(|name| name.starts_with("godwit-doctor-"))
            .collect::<BTreeSet<_>>()
    };
    let before = scratches();
    let began = Instant::now();
    let output = doctor(state.path(), &["-o", "json"]);
    assert!(began.elapsed() < TIME_MAX, "{:?}", began.elapsed());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["for"], serde_json::json!(["agent", "controller", "client"]));
    let checks = report["checks"].as_array().unwrap();
    for check in checks {
        let state = check["state"].as_str().unwrap();
        assert!(["ok", "warning", "problem", "skipped"].contains(&state), "{check}");
        assert!(!check["seen"].as_str().unwrap().is_empty() && !check["why"].as_str().unwrap().is_empty());
        let says_how = check["mend"].as_str().is_some_and(|mend| !mend.is_empty());
        assert!(state == "ok" || says_how, "{check}");
        assert!(!check.to_string().contains("Os {"), "{check}");
    }
    let find = |id: &str| checks.iter().find(|check| check["id"] == id).unwrap();
    assert_eq!(find("kernel")["state"], "ok");
    assert_eq!(find("terminal")["state"], "ok");
    assert_eq!(find("identity")["state"], "skipped");
    assert_eq!(
        find("storage.space")["about"],
        state.path().join("controller").to_str().unwrap()
    );
    let problems = checks.iter().filter(|check| check["state"] == "problem").count();
    assert_eq!(report["summary"]["problem"], problems);
    let code = output.status.code();
    assert_eq!(
        code,
        Some(if problems == 0 { 0 } else { 7 }),
        "{}",
        text(&output.stderr)
    );
    assert_eq!(fs::read_dir(state.path()).unwrap().count(), 0, "nothing stays");
    assert!(scratches().is_subset(&before), "nothing stays");
}

#[test]
fn a_problem_is_told_with_its_mend_and_has_its_exit_code() {
    let state = tempfile::tempdir().unwrap();
    let words = ["--for", "agent", "--qemu", "/nonexistent/qemu", "--uplink", "nosuch0"];
    let output = doctor(state.path(), &words);
    let (printed, said) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(7), "{printed}{said}");
    assert!(
        said.starts_with("error: ") && said.contains("qemu.version") && said.contains("network.mtu"),
        "{said}"
    );
    assert!(
        printed.contains("problem: qemu.version: cannot start /nonexistent/qemu"),
        "{printed}"
    );
    assert!(printed.contains("there is no interface nosuch0"), "{printed}");
    assert!(!printed.contains("terminal"), "that is a client's: {printed}");
}

#[test]
fn a_client_is_fine_without_what_hosts_need() {
    let state = tempfile::tempdir().unwrap();
    let output = doctor(state.path(), &["--for", "client", "-o", "yaml"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let printed = text(&output.stdout);
    assert!(
        printed.contains("id: terminal") && !printed.contains("qemu"),
        "{printed}"
    );
}

#[test]
fn a_token_that_others_can_read_is_a_problem() {
    let state = tempfile::tempdir().unwrap();
    let token = state.path().join("token");
    fs::write(&token, "x").unwrap();
    let mode: fs::Permissions = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    fs::set_permissions(&token, mode).unwrap();
    let words = ["--for", "client", "--token-file", token.to_str().unwrap(), "-o", "json"];
    let output = doctor(state.path(), &words);
    assert_eq!(output.status.code(), Some(7));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["id"] == "files.private").unwrap();
    assert_eq!(check["about"], token.to_str().unwrap());
    assert!(check["mend"].as_str().unwrap().contains("chmod 600"), "{check}");
}
