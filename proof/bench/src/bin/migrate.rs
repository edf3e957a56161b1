//! `cargo xtask bench migrate`: live migration by Godwit and by its peers, interleaved, on one guest.

use anyhow::{Context, Result, bail};
use bench::arms::{self, Arm, Bench};
use bench::guest::Guest;
use bench::measure;
use bench::report::{self, Case, Machine};
use clap::Parser;
use e2e::cluster::Cluster;
use e2e::lab::{Lab, LabConfig, ending};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

/// Live migration by Godwit and by its peers, in turn, on the same guest.
#[derive(Debug, Parser)]
struct Args {
    /// Rounds that count; one more before them warms up.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pairs: u32,
    /// Three rounds.
    #[arg(long, conflicts_with = "pairs")]
    quick: bool,
    /// Only these arms, by name, separated by commas.
    #[arg(long, value_delimiter = ',')]
    arms: Vec<String>,
    /// Write the result here.
    #[arg(long)]
    json: Option<PathBuf>,
    /// The godwit to measure; without it the one beside this program, if there is one.
    #[arg(long, env = "GODWIT_BIN")]
    godwit: Option<PathBuf>,
    /// The QEMU that all arms run.
    #[arg(long, default_value = "/usr/bin/qemu-system-x86_64")]
    qemu: PathBuf,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if ending() => loop {
            // The signal's handler is removing the lab and ends the process.
            std::thread::park();
        },
        Err(error) => {
            eprintln!("bench migrate: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let rounds = if args.quick { 3 } else { args.pairs };
    let private = if arms::Libvirt::is_installed() {
        arms::LIBVIRT_PRIVATE.iter().map(PathBuf::from).collect()
    } else {
        Vec::new()
    };
    let godwit = godwit(args)?;
    let programs = godwit.iter().map(|path| ("godwit".to_owned(), path.clone())).collect();
    let lab = Arc::new(Lab::new(&LabConfig {
        hosts: 4,
        id: None,
        programs,
        private,
    })?);
    let mut arms = chosen(args, &lab, godwit.as_deref())?;
    let guest = Guest::build(&lab, &args.qemu)?;
    let bench = Bench {
        lab: &lab,
        guest: &guest,
    };
    let case = measured(&mut arms, &bench, rounds).map_err(|error| match lab.keep_logs() {
        Some(dir) => error.context(format!("logs: {}", dir.display())),
        None => error,
    })?;
    let machine = machine(args)?;
    let cases = [case];
    println!("\n{}", report::table(&machine, &cases));
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&report::json(&machine, &cases)).context("cannot write JSON")?;
        std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// All rounds of all arms, interleaved; the first round warms up and is dropped.
fn measured(arms: &mut [Box<dyn Arm>], bench: &Bench<'_>, rounds: u32) -> Result<Case> {
    let mut case = Case {
        name: "calm-512M".into(),
        arms: arms.iter().map(|arm| (arm.name(), Vec::new())).collect(),
    };
    for round in 0..=rounds {
        for (index, arm) in arms.iter_mut().enumerate() {
            let sample = measure::sample(arm.as_mut(), bench)?;
            let note = if round == 0 { "  warm-up" } else { "" };
            eprintln!(
                "round {round:>3}/{rounds}  {:<18} blackout {:>6.1} ms  running after {:>7.1} ms{note}",
                arm.name(),
                sample.blackout_ms,
                sample.request_to_running_ms,
            );
            if round > 0 {
                case.arms[index].1.push(sample);
            }
        }
    }
    Ok(case)
}

/// The binary under test: as given, or beside this program; none there leaves the arm out.
fn godwit(args: &Args) -> Result<Option<PathBuf>> {
    if let Some(path) = &args.godwit {
        let found = path
            .canonicalize()
            .with_context(|| format!("no godwit at {}", path.display()))?;
        return Ok(Some(found));
    }
    let beside = std::env::current_exe()
        .context("cannot find this program")?
        .with_file_name("godwit");
    if !beside.exists() {
        eprintln!(
            "arm godwit is left out: no {} (build it, or --godwit PATH)",
            beside.display()
        );
        return Ok(None);
    }
    Ok(Some(beside))
}

/// All arms that can run here, or those asked for.
fn chosen(args: &Args, lab: &Arc<Lab>, godwit: Option<&Path>) -> Result<Vec<Box<dyn Arm>>> {
    let mut all: Vec<Box<dyn Arm>> = Vec::new();
    if let Some(godwit) = godwit {
        all.push(Box::new(arms::Godwit::new(Cluster::over(
            lab.clone(),
            godwit,
            Some(&args.qemu),
        )?)));
    }
    all.push(Box::new(arms::QemuTuned::default()));
    all.push(Box::new(arms::QemuTunedTls::default()));
    all.push(Box::new(arms::QemuTunedTls::two_channels()));
    all.push(Box::new(arms::QemuDefault::default()));
    if arms::Libvirt::is_installed() {
        all.push(Box::new(arms::Libvirt::default()));
        all.push(Box::new(arms::Libvirt::tuned()));
    } else {
        eprintln!(
            "arms libvirt and libvirt-tuned are left out: libvirt is not installed (cargo xtask bench migrate --install)"
        );
    }
    let known: Vec<_> = all.iter().map(|arm| arm.name()).collect();
    if let Some(unknown) = args.arms.iter().find(|name| !known.contains(&name.as_str())) {
        bail!("no arm is called `{unknown}`; there are: {}", known.join(", "));
    }
    all.retain(|arm| args.arms.is_empty() || args.arms.iter().any(|name| name == arm.name()));
    Ok(all)
}

fn machine(args: &Args) -> Result<Machine> {
    let version = e2e::run::run(&[args.qemu.as_os_str(), "--version".as_ref()])?;
    let version = version.split_whitespace().nth(3).unwrap_or("unknown").to_owned();
    // A tree without git (a source package) has no commit to name.
    let commit = e2e::run::run(&["git", "rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|_| "unknown".into());
    Ok(Machine {
        commit: commit.trim().to_owned(),
        cores: std::thread::available_parallelism()
            .context("cannot count processors")?
            .get(),
        accel: "tcg",
        qemu: version,
    })
}
