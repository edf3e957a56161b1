//! What hosts and VMs are said to use is what the kernel says; it is kept over a restart, and a VM's figures go on over a move.

use anyhow::{Context, Result, ensure};
use e2e::api::Api;
use e2e::fixture::{Guest, SETTLE_LIMIT, Shared};
use e2e::suite;
use e2e::terminal::Terminal;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// A guest that is busy is seen so within this.
const SEEN_LIMIT: Duration = Duration::from_secs(30);
/// Two looks and some more.
const LOOKS_LIMIT: Duration = Duration::from_secs(40);
/// Kept busy so: under emulation it needs a good part of a CPU for it.
const WRITTEN_MIB: u32 = 16;
const WRITES_MIB_PER_S: u32 = 64;
/// A guest that does this uses more CPU than one that waits, by far.
const BUSY_CORES: f64 = 0.05;
/// By how much the mean over ten seconds may differ from what `/proc` says over other seconds, on a machine that does other things too.
const TOLERANCE: f64 = 0.35;

fn main() -> ExitCode {
    suite::main::<Shared>(e2e::cases![
        a_busy_guest_is_seen_so_and_its_figures_are_the_kernels,
        every_figure_of_the_dashboard_is_in_a_scrape,
        on_a_terminal_it_draws_what_is_there_and_leaves_it_as_it_was,
        figures_outlive_the_controller_and_go_on_over_a_move,
    ])
}

fn a_busy_guest_is_seen_so_and_its_figures_are_the_kernels(shared: &mut Shared) -> Result<()> {
    let guest = shared.create("busy", 1)?;
    let qemu = shared.settled(&guest, 1)?;
    guest.write_memory(WRITTEN_MIB, WRITES_MIB_PER_S)?;
    guest.write_disk(8, 3)?;
    let began = Instant::now();
    let busy = until(shared, &guest, SEEN_LIMIT, "the guest is not seen busy", |vm| {
        figure(vm, "cpu_cores").is_some_and(|cores| cores > BUSY_CORES)
    })?;
    println!(
        "    seen busy after {:.1} s: {}",
        began.elapsed().as_secs_f64(),
        busy["figures"]
    );
    // The first look may lie in the beginning: the next is of busy time alone.
    let at = busy["at"].as_i64().context("no time")?;
    let (cpu_before, before) = (cpu_seconds(qemu)?, Instant::now());
    let next = until(shared, &guest, LOOKS_LIMIT, "there is no later look", |vm| {
        vm["at"].as_i64() > Some(at + 9000)
    })?;
    let real = (cpu_seconds(qemu)? - cpu_before) / before.elapsed().as_secs_f64();
    let told = figure(&next, "cpu_cores").context("no CPU")?;
    ensure!(
        (told - real).abs() <= real * TOLERANCE,
        "{told:.3} cores are told, {real:.3} used"
    );
    let memory = figure(&next, "memory_bytes").context("no memory")?;
    let resident = resident_bytes(qemu)?;
    ensure!(
        (memory - resident).abs() <= resident * 0.1,
        "{memory} bytes of memory are told, {resident} are there"
    );
    for name in [
        "network_received_bytes_per_s",
        "disk_written_bytes_per_s",
        "cpu_wait_cores",
    ] {
        ensure!(figure(&next, name).is_some(), "there is no {name}: {next}");
    }
    let host = readings(shared, "hosts")?;
    let host = host.iter().find(|host| host["name"] == "h1").context("no h1")?;
    let cores = figure(host, "cpu_cores").context("the host has no CPU")?;
    ensure!(cores >= told * 0.5, "the host uses {cores}, its VM {told}");
    table(shared, &guest)
}

/// What a person sees where there is no terminal.
fn table(shared: &Shared, guest: &Guest) -> Result<()> {
    let shown = shared.cluster.cli(&["top", "--once"])?;
    let line = shown.lines().find(|line| line.starts_with(&guest.name));
    let line = line.with_context(|| format!("{} is not in the table:\n{shown}", guest.name))?;
    ensure!(
        line.contains("h1") && line.contains('%') && line.contains("MiB"),
        "{line}"
    );
    let hosts = shared.cluster.cli(&["top", "--hosts", "--sort", "name"])?;
    let names: Vec<&str> = hosts
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    ensure!(names == ["h1", "h2", "h3"], "{hosts}");
    Ok(())
}

fn every_figure_of_the_dashboard_is_in_a_scrape(shared: &mut Shared) -> Result<()> {
    let guest = shared.create("scraped", 2)?;
    until(shared, &guest, SEEN_LIMIT, "the guest has no figures", |vm| {
        figure(vm, "memory_bytes").is_some()
    })?;
    let scrape = Api::of(&shared.cluster)?.ask("GET", "/metrics", &[], "")?;
    ensure!(scrape.status == 200, "the scrape is answered {}", scrape.status);
    let text = String::from_utf8(scrape.body).context("the scrape is not UTF-8")?;
    ensure!(
        text.ends_with("# EOF\n") && text.matches("# EOF").count() == 1,
        "the scrape has no end"
    );
    let sample = format!(
        "godwit_vm_memory_bytes{{vm=\"scraped\",vm_id=\"{}\",host=\"h2\",project=\"default\"}}",
        guest.id
    );
    ensure!(text.contains(&sample), "{sample} is not told");
    // A metric is there when it has a sample, or, where nothing has happened yet or this kernel does not tell, its description.
    let told: BTreeSet<&str> = text
        .lines()
        .filter_map(|line| match line.strip_prefix("# TYPE ") {
            Some(line) => line.split(' ').next(),
            None => line.split(['{', ' ']).next(),
        })
        .collect();
    let dashboard = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/grafana/godwit.json"))?;
    let dashboard: Value = serde_json::from_str(&dashboard).context("the dashboard is not JSON")?;
    let mut wanted = BTreeSet::new();
    metrics_in(&dashboard, &mut wanted);
    ensure!(wanted.len() > 25, "the dashboard shows {} metrics only", wanted.len());
    let base = |name: &str| {
        let suffix = ["_total", "_bucket"]
            .iter()
            .find_map(|suffix| name.strip_suffix(suffix));
        suffix.unwrap_or(name).to_owned()
    };
    let missing: Vec<&String> = wanted
        .iter()
        .filter(|name| !told.contains(name.as_str()) && !told.contains(base(name).as_str()))
        .collect();
    ensure!(
        missing.is_empty(),
        "the dashboard asks for what no scrape tells: {missing:?}"
    );
    Ok(())
}

fn on_a_terminal_it_draws_what_is_there_and_leaves_it_as_it_was(shared: &mut Shared) -> Result<()> {
    const ALTERNATE: &str = "\u{1b}[?1049";
    let guest = shared.create("drawn", 3)?;
    let mut terminal = Terminal::start(&mut shared.cluster.command(&["top", "--every", "1"]))?;
    terminal.resize(170, 30)?;
    terminal.wait_for(&format!("{ALTERNATE}h"), LOOKS_LIMIT)?;
    terminal.wait_for("MEMORY", LOOKS_LIMIT)?;
    terminal.wait_for(&guest.name, LOOKS_LIMIT)?;
    terminal.wait_for("active", LOOKS_LIMIT)?;
    terminal.type_in("q")?;
    terminal.wait_for(&format!("{ALTERNATE}l"), LOOKS_LIMIT)?;
    let ended = terminal.wait_end(LOOKS_LIMIT)?;
    ensure!(ended.success(), "it ended with {ended}");
    Ok(())
}

fn figures_outlive_the_controller_and_go_on_over_a_move(shared: &mut Shared) -> Result<()> {
    let guest = shared.create("kept", 1)?;
    guest.write_memory(WRITTEN_MIB, WRITES_MIB_PER_S)?;
    let has = |points: usize| move |series: &Value| measured(series) >= points;
    let before = series_until(shared, &guest, LOOKS_LIMIT, has(2))?;
    shared.cluster.kill_controller()?;
    shared.cluster.start_controller()?;
    let after = series(shared, &guest)?;
    ensure!(
        measured(&after) >= measured(&before),
        "figures were lost: {} points became {}",
        measured(&before),
        measured(&after)
    );
    shared
        .cluster
        .json(&["vm", "migrate", &guest.name, "--to", "h2", "--wait"])?;
    shared.settled(&guest, 2)?;
    let points = measured(&series(shared, &guest)?);
    let gone_on = series_until(shared, &guest, LOOKS_LIMIT + SETTLE_LIMIT, has(points + 1))?;
    let vm = reading(shared, &guest)?;
    ensure!(vm["host"]["name"] == "h2", "its figures are of {}", vm["host"]);
    println!("    {} points, on two hosts", measured(&gone_on));
    Ok(())
}

/// Names of metrics in the dashboard's expressions and queries.
fn metrics_in(value: &Value, names: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                match (key.as_str(), value) {
                    ("expr" | "definition", Value::String(text)) => {
                        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
                        names.extend(words.filter(|word| word.starts_with("godwit_")).map(str::to_owned));
                    }
                    _ => metrics_in(value, names),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| metrics_in(item, names)),
        _ => {}
    }
}

fn readings(shared: &Shared, of: &str) -> Result<Vec<Value>> {
    let arguments: &[&str] = if of == "hosts" { &["top", "--hosts"] } else { &["top"] };
    let read = shared.cluster.json(arguments)?;
    read.as_array().cloned().context("no list")
}

fn reading(shared: &Shared, guest: &Guest) -> Result<Value> {
    let mut all = readings(shared, "vms")?.into_iter();
    all.find(|vm| vm["id"] == guest.id.as_str())
        .with_context(|| format!("{} is not told of", guest.name))
}

fn figure(reading: &Value, name: &str) -> Option<f64> {
    reading["figures"][name].as_f64()
}

/// What a VM uses, once that is so.
fn until(
    shared: &Shared,
    guest: &Guest,
    limit: Duration,
    complaint: &str,
    holds: impl Fn(&Value) -> bool,
) -> Result<Value> {
    let end = Instant::now() + limit;
    loop {
        let vm = reading(shared, guest)?;
        if holds(&vm) {
            return Ok(vm);
        }
        ensure!(Instant::now() < end, "{complaint} after {} s: {vm}", limit.as_secs());
        // tidy: sleep because figures are told every ten seconds, without an event
        std::thread::sleep(Duration::from_millis(250));
    }
}

fn series(shared: &Shared, guest: &Guest) -> Result<Value> {
    let path = format!("/v1/metrics/vms/{}?step_s=10", guest.name);
    let reply = Api::of(&shared.cluster)?.ask("GET", &path, &[], "")?;
    ensure!(reply.status == 200, "{path} is answered {}", reply.status);
    serde_json::from_slice(&reply.body).context("the series are not JSON")
}

fn series_until(shared: &Shared, guest: &Guest, limit: Duration, holds: impl Fn(&Value) -> bool) -> Result<Value> {
    let end = Instant::now() + limit;
    loop {
        let seen = series(shared, guest)?;
        if holds(&seen) {
            return Ok(seen);
        }
        ensure!(
            Instant::now() < end,
            "{} points after {} s",
            measured(&seen),
            limit.as_secs()
        );
        // tidy: sleep because figures are told every ten seconds, without an event
        std::thread::sleep(Duration::from_millis(250));
    }
}

/// Points in which CPU time was measured.
fn measured(series: &Value) -> usize {
    let points = series["parts"][0]["series"]["cpu_cores"].as_array();
    points.map_or(0, |points| points.iter().filter(|point| !point.is_null()).count())
}

/// CPU time of a process, s, by the kernel.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("a strange stat")?;
    let ticks = |n: usize| {
        fields
            .split_whitespace()
            .nth(n)
            .and_then(|field| field.parse::<f64>().ok())
    };
    let ticks = ticks(11).zip(ticks(12)).context("no times")?;
    Ok((ticks.0 + ticks.1) / rustix::param::clock_ticks_per_second() as f64)
}

/// Memory of a process, bytes, by the kernel.
fn resident_bytes(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .context("no VmRSS")?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib * 1024.0)
}
