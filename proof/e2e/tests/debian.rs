//! A whole server as a guest: built here of Debian's packages, started by firmware, moved while it runs.

use anyhow::{Context, Result, ensure};
use e2e::cluster::{Cluster, Ended};
use e2e::suite::{self, Fixture};
use e2e::terminal::Terminal;
use e2e::traces;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// An emulated Debian takes a minute on an idle machine until it asks who is there.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
const SAID_LIMIT: Duration = Duration::from_secs(60);
const SETTLE_LIMIT: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    suite::main::<Server>(e2e::cases![
        a_debian_server_starts_by_firmware_and_goes_on_after_a_live_migration
    ])
}

/// Two hosts with the template `debian`.
struct Server {
    cluster: Cluster,
}

impl Fixture for Server {
    fn set_up() -> Result<Self> {
        let godwit = std::env::var_os("GODWIT_BIN").map(PathBuf::from);
        let godwit = godwit.context("GODWIT_BIN does not name the program; run `cargo xtask test --only e2e`")?;
        let target = godwit.canonicalize().context("no such program")?;
        let target = target
            .ancestors()
            .nth(2)
            .context("the program is not in a target directory")?;
        let server = Server {
            cluster: Cluster::started(&godwit, 2, None)?,
        };
        // Kept beside the program for a day.
        let mut build = server.cluster.command(&["template", "build", "debian", "--wait"]);
        let built = Ended::of(build.env("XDG_CACHE_HOME", target.join("e2e-cache")))?;
        ensure!(built.code == Some(0), "Debian is not built: {}", built.err.trim());
        Ok(server)
    }

    fn after_each(&mut self) -> Result<()> {
        let vm = self.cluster.vm("deb")?;
        let id = vm.json["id"].as_str().context("a VM without an id")?.to_owned();
        self.cluster
            .cli(&["vm", "delete", "deb", "--wait", "--timeout", "60"])?;
        traces::gone(self.cluster.lab(), &id, SETTLE_LIMIT)?;
        traces::no_panic(self.cluster.lab())
    }

    fn keep(&self) -> Option<PathBuf> {
        self.cluster.lab().keep_logs()
    }
}

fn a_debian_server_starts_by_firmware_and_goes_on_after_a_live_migration(server: &mut Server) -> Result<()> {
    let cluster = &server.cluster;
    let words = ["vm", "create", "deb", "--template", "debian", "--memory", "512M"];
    cluster.json(&[&words[..], &["--disk", "10G", "--host", "h1", "--wait"]].concat())?;
    let mut console = Terminal::piped(&mut cluster.command(&["vm", "console", "deb"]))?;
    // The getty of the serial console: firmware, GRUB, Linux, systemd have all done their part.
    console.wait_for("debian login:", BOOT_LIMIT)?;
    cluster.json(&["vm", "migrate", "deb", "--to", "h2", "--wait"])?;
    let vm = cluster.wait_vm("deb", SETTLE_LIMIT, |vm| vm.runs_on(2))?;
    let id = vm.json["id"].as_str().context("a VM without an id")?;
    traces::settled(cluster.lab(), id, 2, SETTLE_LIMIT)?;
    let mut there = Terminal::piped(&mut cluster.command(&["vm", "console", "deb"]))?;
    there.type_in("root\r")?;
    // It reads its disk for this. Nobody has a password, and none is the wrong one.
    let shown = there.wait_for("Password:", SAID_LIMIT)?;
    ensure!(
        !shown.contains("Linux version") && !shown.contains("Booting"),
        "it began anew: {shown}"
    );
    there.type_in("\r")?;
    there.wait_for("Login incorrect", SAID_LIMIT)?;
    Ok(())
}
