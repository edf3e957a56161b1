//! What VMs' ports let through: security groups that change at once and whose connections live through a move, limits, links, counters.

use anyhow::{Context, Result, bail, ensure};
use e2e::api::Api;
use e2e::download::Download;
use e2e::fixture::{BOOT_LIMIT, Guest, MEMORY, Shared};
use e2e::lab::Place;
use e2e::probe::enter_netns;
use e2e::suite;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

/// Whoever is let in is heard within this; whoever is not heard by then is not let in.
const HEARD: Duration = Duration::from_secs(5);
const UNHEARD: Duration = Duration::from_millis(1500);
/// Hosts tell what went through their ports every 5 s.
const TOLD: Duration = Duration::from_secs(20);
const DOWNLOAD_MIB: u64 = 8;
const RATE: f64 = 2.0 * 1024.0 * 1024.0;

fn main() -> ExitCode {
    suite::main::<Shared>(e2e::cases![
        what_a_group_let_begin_lives_through_a_move_and_ends_when_it_is_no_longer_allowed,
        a_port_is_held_to_its_limit_and_its_link_and_counts_on_over_a_move,
        what_makes_no_sense_at_a_port_is_refused_and_changes_nothing,
    ])
}

/// Adds the rule by which a web server is reached.
fn let_browsers_in(shared: &Shared, group: &str) -> Result<()> {
    let rule = ["ingress", "--protocol", "tcp", "--port", "80"];
    let words = ["security-group", "add-rule", group];
    shared.cluster.json(&[&words[..], &rule].concat()).map(|_| ())
}

/// A running guest whose port is in a group that lets web browsers in and nothing out.
fn guarded(shared: &Shared, name: &str, group: &str) -> Result<Guest> {
    let cluster = &shared.cluster;
    cluster.json(&["security-group", "create", group])?;
    cluster.cli(&["security-group", "remove-rule", group, "1"])?;
    let_browsers_in(shared, group)?;
    shared.create_with(name, 1, &["--security-group", group])
}

fn what_a_group_let_begin_lives_through_a_move_and_ends_when_it_is_no_longer_allowed(
    shared: &mut Shared,
) -> Result<()> {
    let guest = guarded(shared, "guarded", "web")?;
    let cluster = &shared.cluster;
    let netns = cluster.lab().client_netns();
    let download = Download::start(&netns, guest.ip, 24, 7, 1)?;
    // A second connection says nothing while the VM moves: what is known of it over there was told by its old host.
    let idle = Idle::open(shared, &guest)?;
    until("the download runs", || Ok(download.progress().0 > 0))?;
    cluster.json(&["vm", "migrate", &guest.name, "--to", "h2", "--wait"])?;
    let flow = format!("tcp . 80 . {}", idle.port()?);
    until("the idle connection is known to its new host", || {
        Ok(flows(shared, 2)?.contains(&flow))
    })?;
    idle.asks("after the move")?;
    ensure!(
        download.progress().0 < download.progress().1,
        "the download was over before the move"
    );
    download.finish().context("a download through a move")?;

    cluster.cli(&["security-group", "remove-rule", "web", "2"])?;
    until("the rule is gone", || in_force(shared, &guest))?;
    ensure!(guest.status_within(UNHEARD).is_err(), "a new connection is let in");
    let_browsers_in(shared, "web")?;
    until("the rule is back", || in_force(shared, &guest))?;
    guest.status_within(HEARD)?;
    let said = cluster.attempt(&["security-group", "delete", "web"])?.refused(5)?;
    ensure!(said.contains("is used by 1 ports"), "{said}");
    cluster.json(&["port", "set", &guest.name, "--no-security-group"])?;
    until("it is filtered no longer", || in_force(shared, &guest))?;
    guest.status_within(HEARD)?;
    cluster.cli(&["security-group", "delete", "web"])?;
    Ok(())
}

fn a_port_is_held_to_its_limit_and_its_link_and_counts_on_over_a_move(shared: &mut Shared) -> Result<()> {
    let guest = shared.create("limited", 1)?;
    let cluster = &shared.cluster;
    let free = rate(shared, &guest)?;
    ensure!(free > 1.5 * RATE, "the guest itself is too slow: {free} bytes/s");
    cluster.json(&["port", "set", &guest.name, "--rate-limit", "2M"])?;
    until("the limit is in force", || in_force(shared, &guest))?;
    let here = rate(shared, &guest)?;
    let before = counted(shared, &guest, |sent| sent >= 2 * (DOWNLOAD_MIB << 20))?;
    cluster.json(&["vm", "migrate", &guest.name, "--to", "h2", "--wait"])?;
    let there = rate(shared, &guest)?;
    println!(
        "    {:.2} MiB/s free, {:.2} limited, {:.2} after the move",
        mib(free),
        mib(here),
        mib(there)
    );
    for limited in [here, there] {
        ensure!(
            (limited / RATE - 1.0).abs() < 0.15,
            "{limited} bytes/s instead of {RATE}"
        );
    }
    let after = counted(shared, &guest, |sent| sent >= before + (DOWNLOAD_MIB << 20))?;
    ensure!(
        after < before + 4 * (DOWNLOAD_MIB << 20),
        "{before}, then {after}: counted twice"
    );
    let metrics = Api::of(&shared.cluster)?.ask("GET", "/metrics", &[], "")?;
    let metrics = String::from_utf8_lossy(&metrics.body).into_owned();
    ensure!(
        metrics.contains("godwit_port_bytes_total"),
        "not in the metrics: {metrics}"
    );

    cluster.json(&["port", "set", &guest.name, "--rate-limit", "none", "--link", "down"])?;
    until("the link is down", || in_force(shared, &guest))?;
    ensure!(
        guest.status_within(UNHEARD).is_err(),
        "a guest whose link is down answers"
    );
    cluster.json(&["vm", "migrate", &guest.name, "--to", "h3", "--wait"])?;
    ensure!(guest.status_within(UNHEARD).is_err(), "its link came up by a move");
    cluster.json(&["port", "set", &guest.name, "--link", "up"])?;
    until("the link is up", || in_force(shared, &guest))?;
    cluster.wait_http(guest.ip, BOOT_LIMIT)?;
    ensure!(rate(shared, &guest)? > 1.5 * RATE, "it is still limited");
    Ok(())
}

// tidy: long because it is the list of what is refused.
fn what_makes_no_sense_at_a_port_is_refused_and_changes_nothing(shared: &mut Shared) -> Result<()> {
    let cluster = &shared.cluster;
    let words = [
        "vm",
        "create",
        "off",
        "--template",
        "micro",
        "--memory",
        MEMORY,
        "--no-start",
        "--wait",
    ];
    cluster.json(&words)?;
    cluster.json(&["security-group", "create", "base"])?;
    let refused: [(&[&str], i32, &str); 12] = [
        (&["port", "show", "nobody"], 4, "no port nobody"),
        (
            &["port", "set", "off", "--security-group", "nobody"],
            4,
            "no security group nobody",
        ),
        (&["port", "set", "off", "--rate-limit", "15K"], 1, "not possible"),
        (
            &["port", "set", "off", "--rate-limit", "1M", "--burst", "2G"],
            1,
            "not possible",
        ),
        (
            &["port", "set", "off", "--allow-address", "10.0.0.1/8"],
            2,
            "bits beyond",
        ),
        (&["security-group", "create", "base"], 5, "already"),
        (
            &["security-group", "add-rule", "base", "ingress", "--port", "80"],
            1,
            "has no ports",
        ),
        (
            &[
                "security-group",
                "add-rule",
                "base",
                "ingress",
                "--remote-group",
                "nobody",
            ],
            4,
            "no security group",
        ),
        (&["security-group", "remove-rule", "base", "9"], 4, "never had a rule 9"),
        (&["security-group", "show", "nobody"], 4, "no security group"),
        (
            &["vm", "create", "x", "--template", "micro", "--security-group", "nobody"],
            4,
            "no security group",
        ),
        (
            &["security-group", "add-rule", "base", "ingress", "--port", "90-80"],
            2,
            "lower first",
        ),
    ];
    let before = (
        cluster.json(&["port", "list"])?,
        cluster.json(&["security-group", "list"])?,
    );
    for (words, code, says) in refused {
        let ended = cluster.attempt(words)?;
        ensure!(
            ended.code == Some(code),
            "{words:?} ended with {:?}: {}",
            ended.code,
            ended.err
        );
        ensure!(ended.err.contains(says), "{words:?} says {:?}", ended.err);
    }
    let after = (
        cluster.json(&["port", "list"])?,
        cluster.json(&["security-group", "list"])?,
    );
    ensure!(before == after, "something was changed: {before:?} {after:?}");
    cluster.cli(&["security-group", "delete", "base"])?;
    Ok(())
}

/// A connection of the client's on which nothing is said.
struct Idle(TcpStream);

impl Idle {
    fn open(shared: &Shared, guest: &Guest) -> Result<Self> {
        let (netns, to) = (
            shared.cluster.lab().client_netns(),
            SocketAddr::new(guest.ip.into(), 80),
        );
        let opened = thread::spawn(move || -> Result<TcpStream> {
            enter_netns(&netns)?;
            Ok(TcpStream::connect_timeout(&to, HEARD)?)
        });
        match opened.join() {
            Ok(stream) => Ok(Self(stream?)),
            Err(_) => bail!("the client's thread panicked"),
        }
    }

    fn port(&self) -> Result<u16> {
        Ok(self.0.local_addr()?.port())
    }

    fn asks(mut self, when: &str) -> Result<()> {
        self.0.set_read_timeout(Some(HEARD))?;
        self.0
            .write_all(b"GET /status HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n")?;
        let mut answer = [0; 12];
        self.0
            .read_exact(&mut answer)
            .with_context(|| format!("the connection is dead {when}"))?;
        ensure!(
            answer.starts_with(b"HTTP/1.1 200"),
            "{}",
            String::from_utf8_lossy(&answer)
        );
        Ok(())
    }
}

/// What is under way at filtered ports of a host, as its kernel has it.
fn flows(shared: &Shared, host: u8) -> Result<String> {
    let words = ["nft", "-n", "list", "table", "bridge", "godwit"];
    let listed = shared.cluster.lab().run(Place::Host(host), &words)?;
    // As names, whatever the program prints.
    Ok(listed.replace(" . 6 . ", " . tcp . "))
}

fn port(shared: &Shared, guest: &Guest) -> Result<Value> {
    shared.cluster.json(&["port", "show", &guest.name])
}

fn in_force(shared: &Shared, guest: &Guest) -> Result<bool> {
    Ok(port(shared, guest)?["in_force"] == true)
}

/// What the guest has sent, once its host has told enough.
fn counted(shared: &Shared, guest: &Guest, enough: impl Fn(u64) -> bool) -> Result<u64> {
    let sent = || -> Result<u64> { Ok(port(shared, guest)?["traffic"]["sent_bytes"].as_u64().unwrap_or(0)) };
    until("the port's counters are told", || Ok(enough(sent()?)))?;
    sent()
}

/// Bytes/s of a download that nothing else holds back.
fn rate(shared: &Shared, guest: &Guest) -> Result<f64> {
    let netns = shared.cluster.lab().client_netns();
    let begun = Instant::now();
    let bytes = Download::start(&netns, guest.ip, DOWNLOAD_MIB, 3, 1000)?.finish()?;
    Ok(bytes as f64 / begun.elapsed().as_secs_f64())
}

fn mib(bytes: f64) -> f64 {
    bytes / (1 << 20) as f64
}

fn until(what: &str, mut is: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + TOLD;
    while !is()? {
        ensure!(Instant::now() < end, "{what}: not within {} s", TOLD.as_secs());
        // tidy: sleep because hosts tell their counters now and then, and nothing tells that they have
        thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}
