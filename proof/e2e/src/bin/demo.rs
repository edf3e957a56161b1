//! The demo: a web server in a VM moves between three hosts, and nobody who uses it notices.

use anyhow::{Context, Result, bail};
use e2e::cluster::Cluster;
use e2e::download::Download;
use e2e::lab::{end_is_expected, ending};
use e2e::load::{Load, LoadReport};
use e2e::probe::Probe;
use e2e::receipt::{self, Receipt};
use serde_json::json;
use std::io::{IsTerminal, Write};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

const HELP: &str = "\
Shows a web server in a VM moving between three hosts, on this machine.

Usage: demo [--exit] [--json FILE] [--godwit PATH] [--qemu PATH]

  --exit         end after the receipts instead of staying up
  --json FILE    write the receipts there
  --godwit PATH  the binary to show (default: beside this one)
  --qemu PATH    the QEMU that hosts use (default: the one in PATH)
";

/// Prints a line. A reader who went away, as `head` does, is no reason to end in the middle: the lab is taken down in order.
macro_rules! say {
    ($($what:tt)*) => {{
        let _ = writeln!(std::io::stdout(), $($what)*);
    }};
}

/// Size of the long download. Read at [`DOWNLOAD_RATE_MIB_S`] it lasts longer than both moves.
const DOWNLOAD_MIB: u64 = 256;
const DOWNLOAD_RATE_MIB_S: u64 = 4;
const REQUESTS_PER_S: u32 = 100;
const VM: &str = "web1";

#[derive(Debug, Default)]
struct Args {
    exit: bool,
    json: Option<PathBuf>,
    godwit: Option<PathBuf>,
    qemu: Option<PathBuf>,
}

fn main() -> ExitCode {
    let args = match parse(std::env::args().skip(1)) {
        Ok(Some(args)) => args,
        Ok(None) => {
            say!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("demo: {error}\n\n{HELP}");
            return ExitCode::from(2);
        }
    };
    match demo(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(_) if ending() => loop {
            // The signal's handler is removing the lab and ends the process.
            std::thread::park();
        },
        Err(error) => {
            eprintln!("\ndemo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Option<Args>> {
    let mut args = Args::default();
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            "--exit" => args.exit = true,
            "--json" => args.json = Some(value()?.into()),
            "--godwit" => args.godwit = Some(value()?.into()),
            // Agents have another directory.
            "--qemu" => args.qemu = Some(std::fs::canonicalize(value()?).context("there is no such --qemu")?),
            "-h" | "--help" => return Ok(None),
            _ => bail!("`{word}` is not an option"),
        }
    }
    Ok(Some(args))
}

/// Lines `what  detail  seconds`, the time added when the step is done.
struct Steps {
    terminal: bool,
}

impl Steps {
    fn run<T>(&self, what: &str, body: impl FnOnce() -> Result<T>, detail: impl FnOnce(&T) -> String) -> Result<T> {
        let started = Instant::now();
        if self.terminal {
            let mut terminal = std::io::stdout();
            let _ = write!(terminal, "  {what:<12}...").and_then(|()| terminal.flush());
        }
        let done = body();
        let back = if self.terminal { "\r\x1b[K" } else { "" };
        match &done {
            Ok(value) => {
                let seconds = started.elapsed().as_secs_f64();
                say!("{back}  {what:<12}{:<58}{seconds:>6.1} s", detail(value));
            }
            Err(_) => say!("{back}  {what:<12}failed"),
        }
        done
    }
}

/// Runs it all; whether everything was as promised.
fn demo(args: &Args) -> Result<bool> {
    let godwit = match &args.godwit {
        Some(path) => path.clone(),
        None => std::env::current_exe()
            .context("cannot find this program")?
            .with_file_name("godwit"),
    };
    if let Some(path) = &args.json {
        // Said now, not after the minutes that the demo takes.
        std::fs::File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    }
    say!("Godwit: three hosts on this machine, and a web server that moves between them\n");
    let steps = Steps {
        terminal: std::io::stdout().is_terminal(),
    };
    let mut cluster = steps.run(
        "lab",
        || Cluster::new(&godwit, 3, args.qemu.as_deref()),
        |cluster| {
            let nets = cluster.lab().nets();
            format!(
                "3 network and mount namespaces, {}/24 and {}/24",
                nets.underlay, nets.vm
            )
        },
    )?;
    let shown = show(&steps, &mut cluster, args);
    match shown {
        Ok(good) => {
            if !args.exit {
                stay(&cluster, &godwit)?;
            }
            Ok(good)
        }
        Err(error) => {
            let kept = cluster
                .lab()
                .keep_logs()
                .map_or_else(String::new, |dir| format!("\n  logs: {}", dir.display()));
            Err(error.context(format!("the demo did not end well{kept}")))
        }
    }
}

fn show(steps: &Steps, cluster: &mut Cluster, args: &Args) -> Result<bool> {
    let ip = set_up(steps, cluster)?;
    let netns = cluster.lab().client_netns();
    let probe = Probe::start(&netns, ip)?;
    probe
        .wait_answer(Duration::from_secs(20))
        .context("pinging the guest")?;
    let load = Load::start(&netns, ip, REQUESTS_PER_S)?;
    let download = Download::start(&netns, ip, DOWNLOAD_MIB, 7, DOWNLOAD_RATE_MIB_S)?;
    say!("\n  watched by a ping every ms, {REQUESTS_PER_S} requests/s and one download of {DOWNLOAD_MIB} MiB");
    let mut receipts = Vec::new();
    for to in [2, 3] {
        let receipt = receipt::migrate(cluster, VM, ip, to, &probe, Some(&load))?;
        say!("\n{VM}: {} -> {}", receipt.from, receipt.to);
        for line in receipt.lines() {
            say!("{line}");
        }
        receipts.push(receipt);
    }
    let downloaded = download.finish();
    let report = load.finish()?;
    let good = summary(&receipts, &report, &downloaded);
    if let Some(path) = &args.json {
        write_json(path, &receipts, &report, downloaded.is_ok())?;
    }
    Ok(good)
}

/// Controller, hosts, template, VM; returns the VM's address.
fn set_up(steps: &Steps, cluster: &mut Cluster) -> Result<Ipv4Addr> {
    let api = cluster.api();
    steps.run("controller", || cluster.start_controller(), |()| api)?;
    let join = || (1..=3).try_for_each(|n| cluster.join(n));
    steps.run("hosts", join, |()| "h1, h2, h3 joined with one-use tokens".into())?;
    steps.run(
        "template",
        || cluster.cli(&["template", "build", "micro"]),
        |_| "micro: a kernel, busybox and a web server".into(),
    )?;
    let create = || {
        cluster.json(&[
            "vm",
            "create",
            VM,
            "--template",
            "micro",
            "--memory",
            "512M",
            "--host",
            "h1",
            "--wait",
        ])?;
        let vm = cluster.wait_vm(VM, Duration::from_secs(30), |vm| vm.runs_on(1))?;
        cluster.wait_http(vm.ip, Duration::from_secs(60))?;
        Ok(vm.ip)
    };
    steps.run(VM, create, |ip| format!("runs on h1 and answers at http://{ip}/"))
}

/// The end in a few honest lines; whether all was as promised.
fn summary(receipts: &[Receipt], report: &LoadReport, downloaded: &Result<u64>) -> bool {
    let moves = receipts.len();
    let longest = receipts.iter().map(|receipt| receipt.blackout_ms).fold(0.0, f64::max);
    say!("\n{moves} moves, the longest silence {longest:.1} ms");
    let lost = match report.lost {
        0 => format!("none lost of {} (slowest answer {:.0} ms)", report.sent, report.max_ms),
        lost => format!("{lost} LOST of {}: {}", report.sent, counted(&report.reasons)),
    };
    say!("  requests    {lost}");
    let download = match downloaded {
        Ok(bytes) => format!("{} MiB, every byte right", bytes >> 20),
        Err(error) => format!("BROKEN: {error:#}"),
    };
    say!("  download    {download}");
    let counter = match report.counter_faults {
        0 => "the guest's counter only ever grew: one guest, one past".to_owned(),
        faults => format!("{faults} FAULTS: the guest's counter stood still or fell"),
    };
    say!("  counter     {counter}");
    let well = report.lost == 0 && report.counter_faults == 0 && downloaded.is_ok();
    if !well {
        say!(
            "  NOT as promised (the demo ends with code 1); this machine: {}",
            busy()
        );
    }
    well
}

/// The reasons, each with how often.
fn counted(reasons: &std::collections::BTreeMap<String, u64>) -> String {
    let counts = reasons.iter().map(|(reason, count)| format!("{count} x {reason}"));
    counts.collect::<Vec<_>>().join("; ")
}

/// What is said where it did not go as promised: whether this machine had the time for it.
fn busy() -> String {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: f64 = load.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0);
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let much = load > cpus as f64 * 3.0;
    let judged = if much {
        ": too busy to judge, try again when it is quiet"
    } else {
        ""
    };
    format!("load average {load:.1} on {cpus} CPUs{judged}")
}

fn write_json(path: &Path, receipts: &[Receipt], report: &LoadReport, download_right: bool) -> Result<()> {
    let all = json!({ "demo": "migrate", "receipts": receipts, "load": report, "download_right": download_right });
    let text = serde_json::to_string_pretty(&all).context("cannot write JSON")?;
    std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
}

/// Stays up until a signal, whose handler ends the process.
fn stay(cluster: &Cluster, godwit: &Path) -> Result<()> {
    let ip = cluster.vm(VM)?.ip;
    let godwit = godwit.canonicalize().unwrap_or_else(|_| godwit.to_owned());
    let sudo = if std::env::var_os("SUDO_USER").is_some() {
        "sudo "
    } else {
        ""
    };
    say!("\nIt stays up. In another terminal:\n");
    say!("  curl http://{ip}/status");
    say!(
        "  alias godwit='{sudo}{} --state {}'",
        godwit.display(),
        cluster.state().display()
    );
    say!("  godwit vm list");
    say!("  godwit vm migrate {VM} --to h1");
    say!("  godwit vm console {VM}");
    say!("\nLogs: {}", cluster.lab().logs().display());
    say!("Ctrl-C here removes everything.");
    end_is_expected();
    loop {
        std::thread::park();
    }
}
