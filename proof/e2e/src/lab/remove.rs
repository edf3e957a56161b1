//! The end of a lab, from its directory's name alone: by Drop, by a signal, or
//! by whoever finds it stale.

use super::procs::{Belongs, MARK, namespace_inode};
use super::{ROOT, lock, net, turn};
use crate::run::run;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use tokio::signal::unix::{SignalKind, signal};

/// Set once a signal has begun to remove labs: errors that follow are its echo.
static ENDING: AtomicBool = AtomicBool::new(false);

/// Set when all is done and only a signal can end the process.
static EXPECTED: AtomicBool = AtomicBool::new(false);

/// From now on a signal is the ordinary end: the process then exits with 0.
pub fn end_is_expected() {
    EXPECTED.store(true, Ordering::SeqCst);
}

/// Whether a signal is ending this process; whoever finds an error then should
/// keep silent and wait.
pub fn ending() -> bool {
    ENDING.load(Ordering::SeqCst)
}

/// Removes every lab whose owner is dead; returns their ids.
///
/// # Errors
/// When the labs' directory cannot be made or a stale lab cannot be removed.
pub fn sweep() -> Result<Vec<String>> {
    fs::create_dir_all(ROOT).with_context(|| format!("cannot make {ROOT}"))?;
    let mut removed = Vec::new();
    for entry in fs::read_dir(ROOT).with_context(|| format!("cannot list {ROOT}"))? {
        let dir = entry.context("cannot list the labs")?.path();
        // Held as long as the owner lives; a young lab may not have it yet.
        let _turn = turn()?;
        if !dir.is_dir() || lock(&dir.join("lock"), false).is_err() {
            continue;
        }
        remove(&dir)?;
        removed.push(id_of(&dir));
    }
    Ok(removed)
}

/// Kills the lab's processes and removes its namespaces, interfaces and files.
/// Repeatable: what is gone already is no error.
///
/// # Errors
/// When something does not die or cannot be removed.
pub(super) fn remove(dir: &Path) -> Result<()> {
    let id = id_of(dir);
    let netns = namespaces(&id);
    let belongs = Belongs {
        net: netns.iter().filter_map(|path| namespace_inode(path)).collect(),
        mount: Default::default(),
        mark: Some(format!("{MARK}={}", dir.display())),
    };
    belongs.kill(None)?;
    for end in ["u", "v"] {
        let interface = format!("gw{id}-{end}");
        if Path::new("/sys/class/net").join(&interface).exists() {
            run(&["ip", "link", "del", &interface])?;
        }
    }
    for path in &netns {
        if let Some(name) = path.file_name() {
            run(&["ip".as_ref(), "netns".as_ref(), "del".as_ref(), name])?;
        }
    }
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => {
            // The last one turns off the light; refused while others are there.
            let _ = remove_root();
            Ok(())
        }
    }
}

fn remove_root() -> Result<()> {
    let file = Path::new(ROOT).join("turn");
    // Whoever holds it is about to make a lab or sweeps, and comes here itself.
    let _turn = lock(&file, false)?;
    let mut entries = fs::read_dir(ROOT)?.filter_map(Result::ok);
    if entries.all(|entry| entry.file_name() == "turn") {
        fs::remove_file(file)?;
        fs::remove_dir(ROOT)?;
    }
    Ok(())
}

fn id_of(dir: &Path) -> String {
    dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Network namespaces of lab `id`.
fn namespaces(id: &str) -> Vec<PathBuf> {
    let prefix = net::netns(id, "");
    let entries = fs::read_dir("/run/netns").into_iter().flatten();
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(&prefix)
        })
        .collect()
}

/// SIGINT, SIGTERM or SIGHUP: removes the lab and ends the process.
pub(super) fn on_signals(dir: PathBuf) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the signal handler")?;
    // Registered here, not in the thread: no moment without a handler.
    let guard = runtime.enter();
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut hangup = signal(SignalKind::hangup()).context("cannot handle SIGHUP")?;
    drop(guard);
    let wait = move || {
        let code = runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => 130,
                _ = terminate.recv() => 143,
                _ = hangup.recv() => 129,
            }
        });
        ENDING.store(true, Ordering::SeqCst);
        match remove(&dir) {
            Ok(()) if EXPECTED.load(Ordering::SeqCst) => {
                println!("\nEverything is removed.");
                std::process::exit(0);
            }
            Ok(()) => eprintln!("\nthe lab is removed"),
            Err(error) => eprintln!("\nthe lab could not be removed: {error:#}"),
        }
        std::process::exit(code);
    };
    thread::Builder::new()
        .name("lab-signals".into())
        .spawn(wait)
        .map(drop)
        .context("cannot start the signal handler")
}
