//! Guests ask their host: for their address, for routers, for themselves; and go on asking after a live migration.

use anyhow::{Context, Result, ensure};
use e2e::fixture::{Guest, SETTLE_LIMIT, Shared};
use e2e::suite::{self, Fixture};
use e2e::terminal::Terminal;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// What a guest's shell takes for a command, on a busy machine.
const SAID_LIMIT: Duration = Duration::from_secs(30);
const PREFIX: &str = "fd00:91::/64";

fn main() -> ExitCode {
    suite::main::<Asking>(e2e::cases![
        guests_get_their_addresses_from_their_host_and_renew_them_with_the_next_one,
        guests_are_told_about_themselves_and_nobody_else_is,
    ])
}

/// A cluster whose network answers DHCP and has a prefix.
struct Asking(Shared);

impl Fixture for Asking {
    fn set_up() -> Result<Self> {
        let shared = Shared::set_up()?;
        let words = ["network", "addressing", "default", "--method", "dhcp", "--ipv6", PREFIX];
        let names = [
            "--dns",
            "9.9.9.9",
            "--dns",
            "2620:fe::fe",
            "--search",
            "a.example",
            "--lease",
            "600",
        ];
        shared.cluster.cli(&[&words[..], &names].concat())?;
        Ok(Self(shared))
    }

    fn after_each(&mut self) -> Result<()> {
        self.0.after_each()
    }

    fn keep(&self) -> Option<PathBuf> {
        self.0.keep()
    }
}

/// The shell on a guest's serial console.
struct Shell {
    console: Terminal,
    said: u32,
}

impl Shell {
    fn of(shared: &Shared, guest: &Guest) -> Result<Self> {
        let console = Terminal::piped(&mut shared.cluster.command(&["vm", "console", &guest.name]))?;
        let mut shell = Self { console, said: 0 };
        // It is asked for with this key; a shell that is there already takes it for an empty command.
        shell.console.type_in("\n")?;
        shell.run("stty -echo; true")?;
        Ok(shell)
    }

    /// What a command prints.
    fn run(&mut self, command: &str) -> Result<String> {
        self.said += 1;
        // The end is put together by the shell, so that its echo is none.
        self.console
            .type_in(&format!("{command}; echo \"en\"'d'-{}-\n", self.said))?;
        let said = self.console.wait_for(&format!("end-{}-", self.said), SAID_LIMIT);
        said.with_context(|| format!("after {command}"))
    }

    /// Runs a command until its words are among what it prints.
    fn until(&mut self, command: &str, words: &str) -> Result<String> {
        let asked = format!(
            "i=0; while [ $i -lt 20 ]; do {command} | grep -q '{words}' && break; i=$((i+1)); sleep 1; done; {command}"
        );
        let said = self.run(&asked)?;
        ensure!(said.contains(words), "`{command}` does not say {words}: {said}");
        Ok(said)
    }

    /// Asks the metadata service: status line, and what follows the head.
    fn metadata(&mut self, from: &str, method: &str, path: &str, headers: &[&str]) -> Result<(String, String)> {
        let headers: String = headers.iter().map(|header| format!("{header}\\r\\n")).collect();
        let request = format!("{method} {path} HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n{headers}\\r\\n");
        let said = self.run(&format!(
            "printf '{request}' | nc -w 5 {from} 169.254.169.254 80 | tr -d '\\r'"
        ))?;
        let start = said
            .find("HTTP/1.1 ")
            .map(|at| said[at..].to_owned())
            .unwrap_or_default();
        let (head, body) = start
            .split_once("\n\n")
            .or(start.split_once("\r\n\r\n"))
            .unwrap_or_default();
        let status = head.split_whitespace().nth(1).unwrap_or_default();
        Ok((status.to_owned(), body.trim().to_owned()))
    }

    fn token(&mut self) -> Result<String> {
        let ttl = ["X-aws-ec2-metadata-token-ttl-seconds: 600"];
        let (status, token) = self.metadata("", "PUT", "/latest/api/token", &ttl)?;
        ensure!(status == "200" && token.len() == 80, "no token but {status} {token}");
        Ok(format!("X-aws-ec2-metadata-token: {token}"))
    }

    fn instance_id(&mut self) -> Result<String> {
        let token = self.token()?;
        let (status, id) = self.metadata("", "GET", "/latest/meta-data/instance-id", &[&token])?;
        ensure!(status == "200", "{status} {id}");
        Ok(id)
    }
}

fn v6_of(shared: &Shared, guest: &Guest) -> Result<Ipv6Addr> {
    let vm = shared.cluster.vm(&guest.name)?;
    let v6 = vm.json["ports"][0]["v6"].as_str().and_then(|ip| ip.parse().ok());
    v6.with_context(|| format!("{} has no IPv6 address: {}", guest.name, vm.json["ports"]))
}

fn guests_get_their_addresses_from_their_host_and_renew_them_with_the_next_one(asking: &mut Asking) -> Result<()> {
    let shared = &asking.0;
    // That they answer at their addresses shows that they got them: nobody else told them.
    let (guest, other) = (shared.create("asks", 1)?, shared.create("other", 2)?);
    let mut shell = Shell::of(shared, &guest)?;
    let gateway = shared.cluster.lab().nets().vm_ip(1);
    let lease = format!(
        "{}/24 by 169.254.169.254 for 600 mtu 1500 router {gateway} dns 9.9.9.9 domain a.example host asks",
        guest.ip
    );
    shell.until("cat /run/lease", &format!("bound {lease}"))?;
    let names = shell.run("cat /etc/resolv.conf")?;
    ensure!(
        names.contains("search a.example") && names.contains("nameserver 9.9.9.9"),
        "its names are {names}"
    );
    let (own, others) = (v6_of(shared, &guest)?, v6_of(shared, &other)?);
    shell.until("ip -6 address show dev eth0", &format!("{own}/64"))?;
    ensure!(
        own.to_string().starts_with("fd00:91::"),
        "{own} is of no prefix of the network's"
    );
    shell.until(&format!("ping -6 -c 1 -W 2 {others}"), " 0% packet loss")?;
    let routes = shell.run("ip route; ip -6 route")?;
    ensure!(
        routes.contains("169.254.169.254 dev eth0"),
        "the way to the services is missing: {routes}"
    );
    shared
        .cluster
        .json(&["vm", "migrate", "asks", "--to", "h3", "--wait"])?;
    shared.cluster.wait_vm("asks", SETTLE_LIMIT, |vm| vm.runs_on(3))?;
    let mut shell = Shell::of(shared, &guest)?;
    // The lease says the same, word by word, from the other host.
    shell.run("kill -USR1 $(pidof udhcpc)")?;
    shell.until("head -n 1 /run/lease", &format!("renew {lease}"))?;
    let address = shell.run("ip -4 address show dev eth0")?;
    ensure!(
        address.contains(&format!("{}/24", guest.ip)),
        "its address is another: {address}"
    );
    shell.until(&format!("ping -6 -c 1 -W 2 {others}"), " 0% packet loss")?;
    guest.status().map(drop)
}

fn guests_are_told_about_themselves_and_nobody_else_is(asking: &mut Asking) -> Result<()> {
    let shared = &mut asking.0;
    let (guest, other) = (shared.create("self", 1)?, shared.create("neighbour", 1)?);
    let mut shell = Shell::of(shared, &guest)?;
    let mut others = Shell::of(shared, &other)?;
    ensure!(shell.instance_id()? == guest.id, "it is told that it is another");
    ensure!(
        others.instance_id()? == other.id,
        "its neighbour is told that it is another"
    );
    let path = "/latest/meta-data/instance-id";
    ensure!(
        shell.metadata("", "GET", path, &[])?.0 == "401",
        "without a token it is told"
    );
    let token = shell.token()?;
    ensure!(
        others.metadata("", "GET", path, &[&token])?.0 == "401",
        "another's token serves"
    );
    ensure!(
        shell
            .metadata("", "GET", path, &[&token, "X-Forwarded-For: 10.0.0.1"])?
            .0
            == "403",
        "who asks for another is told"
    );
    ensure!(
        shell.metadata("", "GET", "/latest/user-data", &[&token])?.0 == "404",
        "there is user-data that nobody gave"
    );
    let (_, mac) = shell.metadata("", "GET", "/latest/meta-data/mac", &[&token])?;
    let vm = shared.cluster.vm("self")?;
    ensure!(vm.json["ports"][0]["mac"] == mac.as_str(), "its card is not {mac}");
    // By the neighbour's address nobody is told anything, neither about it nor about oneself.
    shell.run(&format!("ip address add {}/32 dev eth0", other.ip))?;
    let (status, _) = shell.metadata(&format!("-s {}", other.ip), "GET", path, &[&token])?;
    ensure!(status.is_empty(), "a spoofed address is answered: {status}");
    shell.run(&format!("ip address del {}/32 dev eth0", other.ip))?;
    // The agent is another process, then another host.
    shared.cluster.kill_agent(1)?;
    shared.cluster.start_agent(1)?;
    let mut again = Shell::of(shared, &guest)?;
    ensure!(
        again.instance_id()? == guest.id,
        "after a restart of the agent it is another"
    );
    shared
        .cluster
        .json(&["vm", "migrate", "self", "--to", "h2", "--wait"])?;
    shared.cluster.wait_vm("self", SETTLE_LIMIT, |vm| vm.runs_on(2))?;
    let mut there = Shell::of(shared, &guest)?;
    ensure!(there.instance_id()? == guest.id, "on its new host it is another");
    // What it is told names the host that it is on now.
    let token = there.token()?;
    let (_, host) = there.metadata("", "GET", "/latest/meta-data/placement/host-id", &[&token])?;
    let shown = shared.cluster.json(&["host", "show", "h2"])?;
    ensure!(
        shown["id"] == host.as_str(),
        "it is told to be on {host}, not on {}",
        shown["id"]
    );
    Ok(())
}
