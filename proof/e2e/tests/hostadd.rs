//! A machine becomes a host over SSH: it is shown first, nothing stays where it is not added, and it runs VMs afterwards.

use anyhow::{Context, Result, ensure};
use e2e::cluster::Cluster;
use e2e::fixture::MEMORY;
use e2e::lab::{Lab, LabConfig, Place, Proc};
use e2e::run::run;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// A lab of one bare machine with an SSH server, and a controller.
struct Bare {
    cluster: Cluster,
    key: String,
    _sshd: Proc,
    _home: tempfile::TempDir,
}

impl Bare {
    fn new() -> Result<Self> {
        let godwit = PathBuf::from(std::env::var_os("GODWIT_BIN").context("GODWIT_BIN names the binary to test")?);
        let lab = Lab::new(&LabConfig {
            hosts: 1,
            id: None,
            programs: Vec::new(),
            private: ["/etc", "/usr/local/bin"].map(PathBuf::from).into(),
        })?;
        let home = tempfile::tempdir()?;
        let key = home.path().join("key").to_string_lossy().into_owned();
        run(&["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", &key])?;
        let public = std::fs::read_to_string(format!("{key}.pub"))?;
        let host = |argv: &[&str]| lab.run(Place::Host(1), argv);
        // Root's home there is one of its own: this machine's is not touched.
        host(&[
            "sed",
            "-i",
            "s,^root:\\(.*\\):/root:,root:\\1:/srv/root:,",
            "/etc/passwd",
        ])?;
        host(&["mkdir", "-p", "/srv/root/.ssh", "/srv/keys"])?;
        host(&["chmod", "700", "/srv/root", "/srv/root/.ssh"])?;
        host(&[
            "sh",
            "-c",
            "printf %s \"$1\" >/srv/root/.ssh/authorized_keys",
            "sh",
            &public,
        ])?;
        host(&["dropbearkey", "-t", "ed25519", "-f", "/srv/keys/host"])?;
        let server = [
            "dropbear",
            "-F",
            "-E",
            "-s",
            "-p",
            "22",
            "-r",
            "/srv/keys/host",
            "-P",
            "/srv/keys/pid",
        ];
        let sshd = lab.spawn(Place::Host(1), "dropbear", &server)?;
        let mut cluster = Cluster::over(Arc::new(lab), &godwit, None)?;
        cluster.start_controller()?;
        Ok(Self {
            cluster,
            key,
            _sshd: sshd,
            _home: home,
        })
    }

    fn machine(&self) -> Result<String> {
        Ok(format!("root@{}", self.cluster.lab().host(1)?.address()))
    }

    fn there(&self, argv: &[&str]) -> Result<String> {
        self.cluster.lab().run(Place::Host(1), argv)
    }
}

#[test]
fn a_bare_machine_is_shown_added_and_runs_a_vm() -> Result<()> {
    let bare = Bare::new()?;
    let machine = bare.machine()?;
    // The key of a machine that nobody has seen before is asked about; here its answer is given.
    let known = format!("{}.known", bare.key);
    let address = bare.cluster.lab().host(1)?.address().to_string();
    let shim = ssh_that_knows(&bare.key, &known)?;
    let add = |more: &[&str]| {
        let fixed = ["host", "add", &machine, "--identity", &bare.key, "--address", &address];
        let words = [&fixed, more].concat();
        let mut command = bare.cluster.command(&words);
        command.env("PATH", &shim).stdin(std::process::Stdio::null());
        e2e::cluster::Ended::of(&mut command)
    };

    let shown = add(&["--dry-run"])?;
    ensure!(shown.code == Some(0), "{shown:?}");
    ensure!(
        shown.out.contains("would be managed") && shown.out.contains("qemu"),
        "{shown:?}"
    );
    ensure!(
        bare.there(&["ls", "/usr/local/bin/godwit"]).is_err(),
        "the program stayed where nothing was added"
    );

    let unasked = add(&[])?;
    ensure!(unasked.code == Some(2) && unasked.err.contains("--yes"), "{unasked:?}");
    ensure!(
        bare.there(&["ls", "/usr/local/bin/godwit", "/etc/godwit"]).is_err(),
        "something stayed"
    );

    let lacking = add(&["--yes", "--uplink", "nosuch0"])?;
    ensure!(lacking.code == Some(7) && lacking.err.contains("uplink"), "{lacking:?}");

    let added = add(&[
        "--yes",
        "--name",
        "bare1",
        "--uplink",
        "vm0",
        "--pool",
        "local=/srv/godwit/local",
    ])?;
    ensure!(
        added.code == Some(0) && added.out.contains("host bare1 has joined"),
        "{added:?}"
    );
    let mode = bare.there(&["stat", "-c", "%a", "/etc/godwit/agent.toml"])?;
    ensure!(mode.trim() == "600", "the token lies open: {mode}");

    let again = add(&["--yes"])?;
    ensure!(again.code == Some(5) && again.err.contains("already"), "{again:?}");

    bare.cluster.cli(&["template", "build", "micro"])?;
    bare.cluster.cli(&[
        "vm",
        "create",
        "web1",
        "--template",
        "micro",
        "--memory",
        MEMORY,
        "--wait",
    ])?;
    let vm = bare.cluster.vm("web1")?;
    bare.cluster.wait_http(vm.ip, Duration::from_secs(90))
}

/// A search path on which `ssh` takes and keeps new machines' keys in a file of its own.
fn ssh_that_knows(key: &str, known: &str) -> Result<String> {
    use std::os::unix::fs::PermissionsExt as _;
    let directory = PathBuf::from(format!("{key}.bin"));
    std::fs::create_dir(&directory)?;
    let shim = directory.join("ssh");
    let options = format!("-oStrictHostKeyChecking=accept-new -oUserKnownHostsFile={known}");
    std::fs::write(&shim, format!("#!/bin/sh\nexec /usr/bin/ssh {options} \"$@\"\n"))?;
    std::fs::set_permissions(&shim, std::fs::Permissions::from_mode(0o755))?;
    let path = std::env::var("PATH").unwrap_or_default();
    Ok(format!("{}:{path}", directory.display()))
}
