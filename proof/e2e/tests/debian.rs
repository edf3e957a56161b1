//! A whole server as a guest: built here of Debian's packages, started by firmware, told who it is, moved while it runs.

use anyhow::{Context, Result, bail, ensure};
use e2e::cluster::{Cluster, Ended};
use e2e::lab::{Lab, Place};
use e2e::suite::{self, Fixture};
use e2e::terminal::Terminal;
use e2e::traces;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

/// An emulated Debian takes a minute on an idle machine until it asks who is there.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
const SAID_LIMIT: Duration = Duration::from_secs(60);
const SETTLE_LIMIT: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    suite::main::<Server>(e2e::cases![
        a_debian_server_is_who_its_seed_says_and_goes_on_after_a_live_migration
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
        ensure!(!seed_of(self.cluster.lab(), &id).exists(), "its seed was left behind");
        traces::no_panic(self.cluster.lab())
    }

    fn keep(&self) -> Option<PathBuf> {
        self.cluster.lab().keep_logs()
    }
}

fn a_debian_server_is_who_its_seed_says_and_goes_on_after_a_live_migration(server: &mut Server) -> Result<()> {
    let cluster = &server.cluster;
    let key = Key::new(cluster.lab())?;
    let told = cluster.lab().dir().join("user-data");
    let text = format!("#cloud-config\nwrite_files:\n- path: /etc/told\n  content: {SECRET}\n");
    std::fs::write(&told, text).context("cannot write user-data")?;
    let (public, told) = (key.public(), told.to_string_lossy().into_owned());
    let words = ["vm", "create", "deb", "--template", "debian", "--memory", "512M"];
    let guest = [
        "--hostname",
        "web1.example.net",
        "--ssh-key",
        &public,
        "--user-data",
        &told,
    ];
    let place = ["--disk", "10G", "--host", "h1", "--wait"];
    cluster.json(&[&words[..], &guest, &place].concat())?;
    let mut console = Terminal::piped(&mut cluster.command(&["vm", "console", "deb"]))?;
    // The getty of the serial console: firmware, GRUB, Linux, systemd have all done their part.
    console.wait_for("web1 login:", BOOT_LIMIT)?;
    let ip = cluster.vm("deb")?.ip;
    let before = key.ask(cluster.lab(), ip, BOOT_LIMIT)?;
    is_as_told(&before, ip)?;
    serves(cluster, ip)?;
    cluster.json(&["vm", "migrate", "deb", "--to", "h2", "--wait"])?;
    let vm = cluster.wait_vm("deb", SETTLE_LIMIT, |vm| vm.runs_on(2))?;
    let id = vm.json["id"].as_str().context("a VM without an id")?;
    traces::settled(cluster.lab(), id, 2, SETTLE_LIMIT)?;
    // By the same host key, and since the same start.
    let after = key.ask(cluster.lab(), ip, SAID_LIMIT)?;
    ensure!(after == before, "it is another one: {before:?}, then {after:?}");
    serves(cluster, ip)?;
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
    ensure!(
        seed_of(cluster.lab(), id).exists(),
        "its seed is not beside its volumes"
    );
    keeps_quiet(cluster.lab())
}

/// Words of a seed that nobody should see.
const SECRET: &str = "correct-horse-battery-staple";

/// A person's key, and which hosts it knows.
struct Key {
    path: PathBuf,
    known: PathBuf,
}

impl Key {
    fn new(lab: &Lab) -> Result<Self> {
        let key = Key {
            path: lab.dir().join("key"),
            known: lab.dir().join("known-hosts"),
        };
        let path = key.path.to_string_lossy();
        e2e::run::run(&["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "me", "-f", &path])?;
        Ok(key)
    }

    fn public(&self) -> String {
        format!("{}.pub", self.path.display())
    }

    /// What a guest says of itself over SSH, once it takes the key: its boot, its names, its addresses, what it was told.
    fn ask(&self, lab: &Lab, ip: Ipv4Addr, limit: Duration) -> Result<Vec<String>> {
        let (key, known) = (self.path.to_string_lossy(), self.known.to_string_lossy());
        let (known, login) = (format!("UserKnownHostsFile={known}"), format!("debian@{ip}"));
        let mut words = vec![
            "ssh",
            "-n",
            "-i",
            &key,
            "-o",
            &known,
            "-o",
            "IdentitiesOnly=yes",
            "-o",
            "BatchMode=yes",
        ];
        words.extend([
            "-o",
            "StrictHostKeyChecking=accept-new",
            "-o",
            "ConnectTimeout=30",
            &login,
        ]);
        words.push("cat /proc/sys/kernel/random/boot_id; hostname; hostname -f; ip -4 -o addr show scope global; sudo cat /etc/told");
        let end = Instant::now() + limit;
        loop {
            match lab.run(Place::Client, &words) {
                Ok(said) => return Ok(said.lines().map(str::to_owned).collect()),
                Err(error) if Instant::now() > end => return Err(error.context("the guest does not take the key")),
                // Its SSH server is not there yet, or its user is not.
                Err(_) => std::thread::sleep(Duration::from_secs(1)), // tidy: sleep because ssh(1) tells of no event before which it could wait
            }
        }
    }
}

fn is_as_told(said: &[String], ip: Ipv4Addr) -> Result<()> {
    let [_, host, full, address, told] = said else {
        bail!("it says something else of itself: {said:?}");
    };
    let static_address = address.contains(&format!(" {ip}/24 ")) && !address.contains("dynamic");
    ensure!(
        host == "web1" && full == "web1.example.net" && static_address && told == SECRET,
        "it is not as it was told: {said:?}"
    );
    Ok(())
}

fn serves(cluster: &Cluster, ip: Ipv4Addr) -> Result<()> {
    let page = e2e::http::ask(&cluster.lab().client_netns(), ip, "GET", "/", SAID_LIMIT)?;
    ensure!(page.contains("nginx"), "its page is another: {page}");
    Ok(())
}

fn seed_of(lab: &Lab, id: &str) -> PathBuf {
    lab.shared().join("volumes").join(format!("{id}.seed"))
}

/// The secret is in no log, and in nothing that a host keeps for itself.
fn keeps_quiet(lab: &Lab) -> Result<()> {
    let hosts = lab.hosts().iter().map(|host| host.dir().join("state"));
    for place in hosts.chain([lab.logs()]) {
        let place = place.to_string_lossy();
        // 1: nothing found. A file that vanishes meanwhile is no fault.
        let found = Ended::of(Command::new("grep").args(["-rlsF", SECRET, &place]))?;
        ensure!(found.out.is_empty(), "the secret is in {}", found.out.trim());
    }
    Ok(())
}
