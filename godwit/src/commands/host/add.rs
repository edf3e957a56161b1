//! `godwit host add user@address`: looks at a machine over SSH, shows what would be managed, installs this program there and lets it join.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufRead as _, IsTerminal as _, Write as _},
    path::PathBuf,
    time::Duration,
};

use clap::Args;
use model::Name;
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::{
    super::Session,
    remote::{LONG, Remote, SHORT, said},
    token,
};
use crate::{
    exit::{Exit, Failure},
    out::{self, safe, table},
};

/// Where the program goes when no package brought it.
const PROGRAM: &str = "/usr/local/bin/godwit";
/// Where a package has it.
const PACKAGED: &str = "/usr/bin/godwit";
/// What a host that has joined knows of its cell.
const MEMBERSHIP: &str = "/var/lib/godwit/agent/membership.json";
const SETTINGS: &str = "/etc/godwit/agent.toml";
const UNIT: &str = "/etc/systemd/system/godwit-agent.service";
const LOG: &str = "/var/log/godwit-agent.log";

/// The unit that packages have too.
const UNIT_TEXT: &str = include_str!("../../../../packaging/systemd/godwit-agent.service");

/// Without these no guest runs there.
const PACKAGES: [&str; 4] = ["qemu-system-x86", "qemu-utils", "nftables", "iproute2"];

/// How long the token is valid with which the host joins, seconds.
const TOKEN_S: u32 = 600;

/// How long the host may take to join once its agent was started.
const JOINING_MAX: Duration = Duration::from_secs(90);

/// Add a machine as a host, over SSH.
#[derive(Args, Debug)]
pub(crate) struct Add {
    /// The machine, as ssh takes it
    #[arg(value_name = "USER@ADDRESS", value_parser = destination)]
    machine: String,
    /// Its SSH port
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    ssh_port: Option<u16>,
    /// The key to log in with
    #[arg(long, value_name = "FILE")]
    identity: Option<PathBuf>,
    /// Name of the host; without it, its host name
    #[arg(long, value_name = "NAME")]
    name: Option<Name>,
    /// A storage pool there; may be given several times
    #[arg(long = "pool", value_name = "NAME=DIR")]
    pools: Vec<String>,
    /// The interface there by which VMs reach other hosts
    #[arg(long, value_name = "INTERFACE")]
    uplink: Option<String>,
    /// Where other hosts reach it; without it, the address by which it reaches the controller
    #[arg(long, value_name = "ADDRESS")]
    address: Option<std::net::IpAddr>,
    /// Install what is missing there (QEMU, nftables) with apt
    #[arg(long)]
    install: bool,
    /// Only show what would be managed
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

/// A destination that SSH does not take for an option.
fn destination(text: &str) -> Result<String, String> {
    let strange = |c: char| c.is_whitespace() || c.is_control();
    if text.is_empty() || text.starts_with('-') || text.contains(strange) || text.len() > 255 {
        return Err("give USER@ADDRESS, such as root@10.0.0.2".to_owned());
    }
    Ok(text.to_owned())
}

/// What the doctor says there.
#[derive(Deserialize)]
struct Examined {
    checks: Vec<Checked>,
}

#[derive(Deserialize)]
struct Checked {
    id: String,
    state: String,
    seen: String,
    #[serde(default)]
    mend: Option<String>,
}

impl Add {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        let remote = Remote::connect(&self.machine, self.ssh_port, self.identity.as_ref()).await?;
        if remote
            .run(&["test", "-e", MEMBERSHIP], None, SHORT)
            .await?
            .status
            .success()
        {
            let message = format!("{} is a host of a cell already", self.machine);
            return Err(Failure::new(Exit::Conflict, message)
                .hint("`godwit host list` shows it if it is one of this cell; else stop its agent and remove /var/lib/godwit/agent there"));
        }
        if self.install {
            self.install(&remote).await?;
        }
        let program = Self::program(&remote).await?;
        let found = self.examine(&remote, program).await;
        let go_on = match &found {
            Ok(examined) => self.show(session, &remote, examined).await,
            Err(_) => Ok(false),
        };
        match go_on {
            Ok(true) => self.join(session, &remote, program).await,
            other => {
                // Nothing stays of a machine that is not added.
                if program == PROGRAM {
                    remote.done(&["rm", "-f", PROGRAM], None, SHORT).await?;
                }
                found.and(other).map(|_| ())
            }
        }
    }

    async fn install(&self, remote: &Remote) -> Result<(), Failure> {
        out::note(&format!("installing on {}: {}", self.machine, PACKAGES.join(", ")));
        let apt = [
            "env",
            "DEBIAN_FRONTEND=noninteractive",
            "apt-get",
            "-y",
            "--no-install-recommends",
            "install",
        ];
        let words: Vec<&str> = apt.into_iter().chain(PACKAGES).collect();
        let installed = remote.run(&words, None, LONG).await?;
        if installed.status.success() {
            return Ok(());
        }
        // Lists older than the mirror name files that are gone.
        remote.done(&["apt-get", "update"], None, LONG).await?;
        remote.done(&words, None, LONG).await.map(|_| ())
    }

    /// Where the program is there, of this version; put there where it is not.
    async fn program(remote: &Remote) -> Result<&'static str, Failure> {
        let own = || -> io::Result<File> { File::open("/proc/self/exe") };
        let failed = |error: io::Error| Failure::new(Exit::Failed, format!("cannot read this program's file: {error}"));
        let mut hash = Sha256::new();
        io::copy(&mut own().map_err(failed)?, &mut hash).map_err(failed)?;
        let wanted: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        for place in [PACKAGED, PROGRAM] {
            let sum = remote.run(&["sha256sum", place], None, SHORT).await?;
            if String::from_utf8_lossy(&sum.stdout).starts_with(&wanted) {
                return Ok(place);
            }
            if place == PACKAGED && sum.status.success() {
                let message = "another godwit is installed there by a package";
                return Err(Failure::new(Exit::Conflict, message).hint("install the same package on both machines"));
            }
        }
        remote.upload(PROGRAM, "0755", own().map_err(failed)?).await?;
        Ok(PROGRAM)
    }

    async fn examine(&self, remote: &Remote, program: &str) -> Result<Examined, Failure> {
        let mut words = vec![program, "doctor", "--for", "agent", "-o", "json"];
        for pool in &self.pools {
            words.extend(["--pool", pool]);
        }
        if let Some(uplink) = &self.uplink {
            words.extend(["--uplink", uplink]);
        }
        let output = remote.run(&words, None, SHORT).await?;
        serde_json::from_slice(&output.stdout).map_err(|_| {
            Failure::new(
                Exit::Failed,
                format!("godwit does not run on {}: {}", self.machine, said(&output)),
            )
        })
    }

    /// Shows what would be managed, and asks; whether to go on.
    async fn show(&self, session: &Session, remote: &Remote, examined: &Examined) -> Result<bool, Failure> {
        let name = remote.text(&["hostname"]).await?;
        let problems: Vec<&Checked> = examined
            .checks
            .iter()
            .filter(|check| check.state == "problem")
            .collect();
        if session.format.is_data() {
            let checks: BTreeMap<&str, Value> = examined
                .checks
                .iter()
                .map(|check| {
                    (
                        &*check.id,
                        json!({ "state": check.state, "seen": check.seen, "mend": check.mend }),
                    )
                })
                .collect();
            out::data(
                session.format,
                &json!({ "machine": self.machine, "host_name": name, "checks": checks }),
            )?;
        } else {
            let rows = examined.checks.iter().filter(|check| check.state != "skipped");
            let rows: Vec<Vec<String>> = rows
                .map(|check| vec![check.state.clone(), check.id.clone(), check.seen.clone()])
                .collect();
            out::text(&format!(
                "{} ({}) would be managed as a host:\n",
                self.machine,
                safe::text(&name)
            ))?;
            out::text(&table::rows(&["STATE", "CHECK", "SEEN"], rows))?;
        }
        if let Some(first) = problems.first() {
            let named: Vec<&str> = problems.iter().map(|check| &*check.id).collect();
            let message = format!("{} lacks what a host needs: {}", self.machine, named.join(", "));
            let mend = first.mend.clone().unwrap_or_default();
            return Err(Failure::new(Exit::Unwell, message)
                .hint(format!("on it: {mend}; or let this command do it: --install")));
        }
        Ok(!self.dry_run && (self.yes || self.agreed()?))
    }

    fn agreed(&self) -> Result<bool, Failure> {
        if !io::stdin().is_terminal() {
            return Err(
                Failure::new(Exit::Usage, "nobody is there to ask").hint("give --yes, or --dry-run to look only")
            );
        }
        eprint!("Add it? [y/N] ");
        let mut answer = String::new();
        let read = io::stderr()
            .flush()
            .and_then(|()| io::stdin().lock().read_line(&mut answer));
        read.map_err(|error| Failure::of(Exit::Failed, &error))?;
        Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
    }

    async fn join(&self, session: &Session, remote: &Remote, program: &str) -> Result<(), Failure> {
        // From before it joins, so that it cannot be missed.
        let mut events = session.client.events(None, true).await?;
        let join = token(session, TOKEN_S).await?["join"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        remote.write(SETTINGS, "0600", self.settings(&join).as_bytes()).await?;
        if remote
            .run(&["test", "-d", "/run/systemd/system"], None, SHORT)
            .await?
            .status
            .success()
        {
            if program == PROGRAM {
                remote
                    .write(UNIT, "0644", UNIT_TEXT.replace(PACKAGED, PROGRAM).as_bytes())
                    .await?;
            }
            remote.done(&["systemctl", "daemon-reload"], None, SHORT).await?;
            let started = remote
                .done(&["systemctl", "enable", "--now", "godwit-agent"], None, SHORT)
                .await;
            started.map_err(|failure| failure.hint("on it: journalctl -u godwit-agent"))?;
        } else {
            // Words, not text: the shell there sees the fixed script and its arguments.
            let script = "exec setsid -f \"$1\" agent --config \"$2\" >>\"$3\" 2>&1 </dev/null";
            remote
                .done(&["sh", "-c", script, "sh", program, SETTINGS, LOG], None, SHORT)
                .await?;
            out::note(&format!(
                "there is no systemd: the agent runs until {} is restarted; start `godwit agent --config {SETTINGS}` at its start",
                self.machine
            ));
        }
        let up = tokio::time::timeout(JOINING_MAX, Self::up(remote, &mut events)).await;
        let Ok(name) = up else {
            let message = format!("{} did not join within {} s", self.machine, JOINING_MAX.as_secs());
            return Err(
                Failure::new(Exit::TimedOut, message).hint(format!("on it: journalctl -u godwit-agent, or {LOG}"))
            );
        };
        super::said(session, true, &format!("host {} has joined", safe::text(&name?)))
    }

    /// Waits until that machine, and no other that joins meanwhile, is a host whose agent is connected; its name.
    async fn up(remote: &Remote, events: &mut crate::client::sse::Events) -> Result<String, Failure> {
        loop {
            let Some(event) = events.next().await? else {
                return Err(
                    Failure::new(Exit::Unreachable, "the server ended the stream of events").hint("godwit host list")
                );
            };
            let data: Value = serde_json::from_str(&event.data).unwrap_or_default();
            // A host that is connected has written down who it is.
            if data["what"] != "host.up" {
                continue;
            }
            let kept = remote.run(&["cat", MEMBERSHIP], None, SHORT).await?;
            let kept: Value = serde_json::from_slice(&kept.stdout).unwrap_or_default();
            if kept["host"].is_string() && kept["host"] == data["id"] {
                return Ok(data["name"].as_str().unwrap_or_default().to_owned());
            }
        }
    }

    /// The agent's settings; the token in them is of use once.
    fn settings(&self, join: &str) -> String {
        let mut table = toml::Table::new();
        let mut put = |key: &str, value: Option<String>| {
            if let Some(value) = value {
                table.insert(key.to_owned(), toml::Value::String(value));
            }
        };
        put("join", Some(join.to_owned()));
        put("name", self.name.as_ref().map(ToString::to_string));
        put("uplink", self.uplink.clone());
        put("address", self.address.map(|address| address.to_string()));
        if !self.pools.is_empty() {
            let pools = self.pools.iter().cloned().map(toml::Value::String).collect();
            table.insert("pool".to_owned(), toml::Value::Array(pools));
        }
        table.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ssh_would_take_for_an_option_is_no_machine() {
        assert!(destination("root@10.0.0.2").is_ok());
        for text in ["", "-oProxyCommand=x", "a b", "a\nb", &"a".repeat(300)] {
            assert!(destination(text).is_err(), "{text}");
        }
    }
}
