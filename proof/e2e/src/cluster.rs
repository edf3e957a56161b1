//! Godwit as its users run it, in a lab: a controller, an agent a host, and the
//! command line. Nothing here reaches behind the binary.

use crate::lab::{Lab, LabConfig, Place, Proc};
use crate::run::run_env;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::ffi::OsStr;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Port of the API on the lab's first address.
const API_PORT: u16 = 8443;
/// Port that agents dial.
const AGENT_PORT: u16 = 8444;
/// A start that takes longer has failed. An agent may try an accelerator for 30 s before it takes the other.
const START_LIMIT: Duration = Duration::from_secs(90);
/// Commands wait for operations; the longest (a template's build) has to download.
const COMMAND_LIMIT: &str = "900";

/// A controller with its hosts. Dropping it ends and removes all of them.
#[derive(Debug)]
pub struct Cluster {
    godwit: PathBuf,
    qemu: Option<PathBuf>,
    controller: Option<Proc>,
    agents: Vec<Option<Proc>>,
    lab: Arc<Lab>,
}

impl Cluster {
    /// A lab of `hosts` hosts for the binary `godwit`; nothing is started yet.
    ///
    /// # Errors
    /// As [`Lab::new`]'s, and when there is no such binary.
    pub fn new(godwit: &Path, hosts: u8, qemu: Option<&Path>) -> Result<Cluster> {
        let godwit = found(godwit)?;
        let programs = vec![("godwit".to_owned(), godwit.clone())];
        let lab = Lab::new(&LabConfig {
            hosts,
            id: None,
            programs,
            private: Vec::new(),
        })?;
        Cluster::over(Arc::new(lab), &godwit, qemu)
    }

    /// In a lab that is there already and shows its hosts `godwit` among its
    /// programs; nothing is started yet.
    ///
    /// # Errors
    /// When there is no such binary.
    pub fn over(lab: Arc<Lab>, godwit: &Path, qemu: Option<&Path>) -> Result<Cluster> {
        let agents = lab.hosts().iter().map(|_| None).collect();
        Ok(Cluster {
            godwit: found(godwit)?,
            qemu: qemu.map(Path::to_owned),
            controller: None,
            agents,
            lab,
        })
    }

    /// A running controller and `hosts` joined hosts.
    ///
    /// # Errors
    /// When one of them does not say that it is ready.
    pub fn started(godwit: &Path, hosts: u8, qemu: Option<&Path>) -> Result<Cluster> {
        let mut cluster = Cluster::new(godwit, hosts, qemu)?;
        cluster.start_controller()?;
        for n in 1..=hosts {
            cluster.join(n)?;
        }
        Ok(cluster)
    }

    /// The lab it runs in.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The controller's state directory, which `--state` takes.
    pub fn state(&self) -> PathBuf {
        self.lab.dir().join("controller")
    }

    /// Where the API is.
    pub fn api(&self) -> String {
        format!("https://{}:{API_PORT}", self.lab.nets().underlay_ip(1))
    }

    /// Starts the controller, the first time or again on the same state.
    ///
    /// # Errors
    /// When it does not say `ready`.
    pub fn start_controller(&mut self) -> Result<()> {
        let nets = self.lab.nets();
        let ip = nets.underlay_ip(1).to_string();
        let argv = [
            self.godwit.to_string_lossy().into_owned(),
            "controller".into(),
            "--state".into(),
            self.state().to_string_lossy().into_owned(),
            "--listen".into(),
            format!("{ip}:{API_PORT}"),
            "--agent-listen".into(),
            format!("{ip}:{AGENT_PORT}"),
            "--name".into(),
            ip,
            "--subnet".into(),
            format!("{}/24", nets.vm),
            "--gateway".into(),
            nets.vm_ip(1).to_string(),
            "--range".into(),
            format!("{}-{}", nets.vm_ip(50), nets.vm_ip(250)),
        ];
        let mut controller = self.lab.spawn(Place::Root, "controller", &argv)?;
        controller.wait_line("ready ", START_LIMIT)?;
        self.controller = Some(controller);
        Ok(())
    }

    /// Kills the controller with SIGKILL.
    ///
    /// # Errors
    /// When it is not running or does not die.
    pub fn kill_controller(&mut self) -> Result<()> {
        self.controller.take().context("the controller is not running")?.kill()
    }

    /// Joins host `n` with a fresh token and starts its agent.
    ///
    /// # Errors
    /// When the controller gives no token or the agent does not say `ready`.
    pub fn join(&mut self, n: u8) -> Result<()> {
        let answer = self.json(&["host", "add-token"])?;
        let join = answer["join"]
            .as_str()
            .context("`host add-token` gave nothing to join with")?;
        self.agent(n, &["--join".to_owned(), join.to_owned()])
    }

    /// Starts the agent of host `n`, which has joined before.
    ///
    /// # Errors
    /// When it does not say `ready`.
    pub fn start_agent(&mut self, n: u8) -> Result<()> {
        self.agent(n, &[])
    }

    fn agent(&mut self, n: u8, more: &[String]) -> Result<()> {
        let host = self.lab.host(n)?;
        let mut argv: Vec<String> = ["/run/godwit-bin/godwit", "agent", "--state", "/var/lib/godwit"]
            .into_iter()
            .chain(["--run-dir", "/run/godwit", "--pool", "shared=/srv/godwit/shared"])
            .chain([
                "--pool",
                "local=/srv/godwit/local",
                "--bridge",
                "godwit0",
                "--uplink",
                "vm0",
            ])
            .map(str::to_owned)
            .collect();
        argv.extend(["--name".to_owned(), host.name().to_owned()]);
        argv.extend(["--address".to_owned(), host.address().to_string()]);
        if let Some(qemu) = &self.qemu {
            argv.extend(["--qemu".to_owned(), qemu.to_string_lossy().into_owned()]);
        }
        argv.extend_from_slice(more);
        let mut agent = self.lab.spawn(Place::Host(n), &format!("agent-h{n}"), &argv)?;
        agent.wait_line("ready ", START_LIMIT)?;
        *self.agent_slot(n)? = Some(agent);
        Ok(())
    }

    /// Kills the agent of host `n` with SIGKILL; its guests go on.
    ///
    /// # Errors
    /// When it is not running or does not die.
    pub fn kill_agent(&mut self, n: u8) -> Result<()> {
        let agent = self.agent_slot(n)?.take();
        agent
            .with_context(|| format!("the agent of h{n} is not running"))?
            .kill()
    }

    fn agent_slot(&mut self, n: u8) -> Result<&mut Option<Proc>> {
        let slot = n
            .checked_sub(1)
            .and_then(|index| self.agents.get_mut(usize::from(index)));
        slot.with_context(|| format!("the lab has no host h{n}"))
    }

    /// The process id of the agent of host `n`, while it runs.
    ///
    /// # Errors
    /// When it was not started or has ended.
    pub fn agent_pid(&mut self, n: u8) -> Result<u32> {
        living(self.agent_slot(n)?.as_mut(), &format!("the agent of h{n}"))
    }

    /// The process id of the controller, while it runs.
    ///
    /// # Errors
    /// When it was not started or has ended.
    pub fn controller_pid(&mut self) -> Result<u32> {
        living(self.controller.as_mut(), "the controller")
    }

    /// Where the API listens.
    pub fn api_address(&self) -> SocketAddr {
        SocketAddr::from((self.lab.nets().underlay_ip(1), API_PORT))
    }

    /// Where agents dial.
    pub fn agents_address(&self) -> SocketAddr {
        SocketAddr::from((self.lab.nets().underlay_ip(1), AGENT_PORT))
    }

    /// The environment in which `godwit` finds this cluster's controller.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        let state = self.state();
        let file = |name: &str| state.join(name).to_string_lossy().into_owned();
        vec![
            ("GODWIT_SERVER", self.api()),
            ("GODWIT_TOKEN_FILE", file("admin.token")),
            ("GODWIT_CA", file("ca.pem")),
        ]
    }

    /// The command line of `godwit ARGUMENTS`, under a deadline.
    pub fn argv(&self, arguments: &[&str]) -> Vec<String> {
        let godwit = self.godwit.to_string_lossy().into_owned();
        let words = ["timeout", "-k", "5", COMMAND_LIMIT, &godwit]
            .into_iter()
            .chain(arguments.iter().copied());
        words.map(str::to_owned).collect()
    }

    /// Runs `godwit ARGUMENTS` and returns what it prints.
    ///
    /// # Errors
    /// When it ends with another status than 0; the message is what it said.
    pub fn cli(&self, arguments: &[&str]) -> Result<String> {
        run_env(&self.argv(arguments), &self.environment())
    }

    /// `godwit ARGUMENTS`, to be started as the caller wishes; its streams are this process's own until they are set.
    pub fn command<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Command {
        let mut command = Command::new(&self.godwit);
        command.args(arguments).envs(self.environment());
        command
    }

    /// Runs `godwit ARGUMENTS` and returns how it ended, well or not.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn attempt(&self, arguments: &[&str]) -> Result<Ended> {
        let (timeout, words) = ("timeout", self.argv(arguments));
        let mut command = Command::new(timeout);
        command
            .args(words.iter().skip(1))
            .envs(self.environment())
            .stdin(Stdio::null());
        Ended::of(&mut command)
    }

    /// Runs `godwit ARGUMENTS -o json` and parses what it prints.
    ///
    /// # Errors
    /// As [`Cluster::cli`], and when it is not JSON.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let mut all = arguments.to_vec();
        all.extend(["-o", "json"]);
        let text = self.cli(&all)?;
        serde_json::from_str(&text).with_context(|| format!("`godwit {}` did not print JSON: {text}", all.join(" ")))
    }

    /// What `vm show` says.
    ///
    /// # Errors
    /// As [`Cluster::json`].
    pub fn vm(&self, name: &str) -> Result<Vm> {
        let shown = self.json(&["vm", "show", name])?;
        Vm::from_json(shown).with_context(|| format!("`godwit vm show {name} -o json`"))
    }

    /// Asks `vm show` until `wanted` holds.
    ///
    /// # Errors
    /// When it does not within `limit`.
    pub fn wait_vm(&self, name: &str, limit: Duration, wanted: impl Fn(&Vm) -> bool) -> Result<Vm> {
        let end = Instant::now() + limit;
        loop {
            let vm = self.vm(name)?;
            if wanted(&vm) {
                return Ok(vm);
            }
            if Instant::now() > end {
                bail!("{name} is {} on {:?} after {} s", vm.state, vm.host, limit.as_secs());
            }
            // The command line offers no event for an arbitrary condition.
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until the web server of a guest answers, from the client's place.
    ///
    /// # Errors
    /// When it does not within `limit`.
    pub fn wait_http(&self, ip: Ipv4Addr, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        loop {
            let asked = crate::http::ask(
                &self.lab.client_netns(),
                ip,
                "GET",
                "/status",
                Duration::from_millis(1000),
            );
            match asked {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > end => {
                    return Err(error.context(format!("the guest does not answer after {} s", limit.as_secs())));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }
}

fn living(process: Option<&mut Proc>, what: &str) -> Result<u32> {
    let process = process.with_context(|| format!("{what} was not started"))?;
    if !process.running()? {
        bail!("{what} has ended; its log is {}", process.log().display());
    }
    Ok(process.id())
}

/// How a command ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Its exit status; none when a signal ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
}

impl Ended {
    /// Runs a command to its end.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn of(command: &mut Command) -> Result<Ended> {
        let output = command
            .output()
            .with_context(|| format!("cannot start {:?}", command.get_program()))?;
        Ok(Ended {
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Whether it is a refusal as people get them: this exit code, first a line `error: ...`, at most a line of advice and one
    /// with the operation, and no panic. Returns the first line.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn refused(&self, code: i32) -> Result<String> {
        let said = self.err.trim_end();
        if self.code != Some(code) {
            bail!("ended with {:?} instead of {code}: {said} {}", self.code, self.out);
        }
        let first = said.lines().next().unwrap_or_default();
        if !first.starts_with("error: ") || first.len() < 12 {
            bail!("does not say what is wrong in its first line: {said:?}");
        }
        if said.contains("panicked") || said.chars().any(|c| c.is_control() && c != '\n') {
            bail!("says what people should not see: {said:?}");
        }
        Ok(first.to_owned())
    }
}

fn found(godwit: &Path) -> Result<PathBuf> {
    godwit
        .canonicalize()
        .with_context(|| format!("no godwit at {} (build it: cargo build --release)", godwit.display()))
}

/// A VM as `vm show -o json` tells.
#[derive(Clone, Debug)]
pub struct Vm {
    /// Its observed state.
    pub state: String,
    /// The host that runs it, by name.
    pub host: Option<String>,
    /// Its first address.
    pub ip: Ipv4Addr,
    /// All that was said.
    pub json: Value,
}

impl Vm {
    fn from_json(json: Value) -> Result<Vm> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        Ok(Vm {
            state: text(&json["status"]["state"]).context("no status.state")?,
            host: text(&json["host"]["name"]),
            ip: json["ports"][0]["ip"]
                .as_str()
                .and_then(|ip| ip.parse().ok())
                .context("no ports[0].ip")?,
            json,
        })
    }

    /// Whether it runs on host `n`.
    pub fn runs_on(&self, n: u8) -> bool {
        self.state == "active" && self.host.as_deref() == Some(format!("h{n}").as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_vm_is_read_from_what_vm_show_prints() {
        let shown =
            json!({ "status": { "state": "active" }, "host": { "name": "h2" }, "ports": [{ "ip": "10.91.0.50" }] });
        let vm = Vm::from_json(shown).unwrap();
        assert!(vm.runs_on(2) && !vm.runs_on(1));
        assert_eq!(vm.ip, Ipv4Addr::new(10, 91, 0, 50));
        assert!(Vm::from_json(json!({ "status": {} })).is_err());
    }

    #[test]
    fn a_refusal_has_its_code_and_one_line_that_says_what_is_wrong() {
        let ended = |code, err: &str| Ended {
            code: Some(code),
            out: String::new(),
            err: err.to_owned(),
        };
        assert_eq!(
            ended(4, "error: there is no VM x\n  next: look\n").refused(4).unwrap(),
            "error: there is no VM x"
        );
        assert!(ended(1, "error: there is no VM x\n").refused(4).is_err());
        assert!(ended(101, "thread 'main' panicked at x.rs\n").refused(101).is_err());
        assert!(ended(4, "error: \u{1b}[31m there is no VM\n").refused(4).is_err());
    }
}
