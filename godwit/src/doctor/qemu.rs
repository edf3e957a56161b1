//! QEMU: which one, what it can do, and whether KVM really runs guests.

use std::{fs, io, time::Duration};

use ::qemu::{Capabilities, DiscoverError, ProbeError, Program, Verdict, discover, probe};
use model::{host::Accelerator, layout::Family};

use tokio::time::timeout;

use super::{Check, Checks, Look, Topic, process, topic};
use crate::exit::chain;

pub(super) const TOPICS: &[&Topic] = &[
    &topic::QEMU,
    &topic::QEMU_MACHINES,
    &topic::ACCELERATOR,
    &topic::QEMU_EMULATED,
];

pub(super) const IMG_TOPICS: &[&Topic] = &[&topic::QEMU_IMG];

/// How long asking, and at the same time probing, may take: less than their group.
const STEP_MAX: Duration = Duration::from_millis(4500);

/// The oldest QEMU that copies an emulated guest while it runs (docs/adr/0022).
const COPIES_EMULATED_FROM: u32 = 10;

/// Starts QEMU twice: once to ask it, once with a guest of a few hundred instructions under each accelerator.
pub(super) async fn look(look: &Look) -> Checks {
    let program = Program::locate(Some(&look.asked.qemu));
    if !look.is_real {
        return TOPICS
            .iter()
            .map(|topic| Check::skipped(topic, "QEMU is not asked").mend("godwit doctor"))
            .collect();
    }
    let is_forbidden = !look.is_root && kvm_is_forbidden();
    let probed = async {
        match is_forbidden {
            true => None,
            false => Some(timeout(STEP_MAX, probe(&program)).await),
        }
    };
    let (asked, verdict) = tokio::join!(timeout(STEP_MAX, discover(&program)), probed);
    let late = |topic: &'static Topic| {
        let seen = format!("QEMU had not finished after {:.1} s", STEP_MAX.as_secs_f64());
        Check::warning(topic, seen, "look again when the machine is less busy")
    };
    let mut checks = Vec::new();
    let major = match asked {
        Err(_) => {
            checks.extend(
                [
                    &topic::QEMU,
                    &topic::QEMU_MACHINES,
                    &topic::ACCELERATOR,
                    &topic::QEMU_EMULATED,
                ]
                .map(late),
            );
            return checks;
        }
        Ok(asked) => {
            checks.push(version(look, &asked));
            let Ok(capabilities) = asked else {
                let rest = |topic: &'static Topic| {
                    Check::skipped(topic, "there is no QEMU that could be asked").mend(install(look))
                };
                checks.extend([&topic::QEMU_MACHINES, &topic::ACCELERATOR, &topic::QEMU_EMULATED].map(rest));
                return checks;
            };
            checks.push(machines(look, &capabilities));
            capabilities.version.major
        }
    };
    match verdict {
        None => {
            let seen = "this user may not open /dev/kvm; the agent runs as root";
            checks.extend([&topic::ACCELERATOR, &topic::QEMU_EMULATED].map(|topic| Check::needs_root(topic, seen)));
        }
        Some(Err(_)) => checks.extend([late(&topic::ACCELERATOR), emulated_moves(look, major, None)]),
        Some(Ok(verdict)) => checks.extend([
            accelerator(look, &verdict),
            emulated_moves(look, major, verdict.as_ref().ok()),
        ]),
    }
    checks
}

fn kvm_is_forbidden() -> bool {
    let opened = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    opened.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
}

fn install(look: &Look) -> String {
    look.install("qemu-system-x86", "QEMU for x86-64, 7.2 or newer,") + "; or name another with --qemu PATH"
}

fn version(look: &Look, asked: &Result<Capabilities, DiscoverError>) -> Check {
    match asked {
        Ok(capabilities) => Check::ok(&topic::QEMU, format!("QEMU {}", capabilities.version)),
        Err(error @ DiscoverError::TooOld { .. }) => Check::problem(
            &topic::QEMU,
            chain(error),
            format!("upgrade to Debian 12, Ubuntu 24.04 or newer; {}", install(look)),
        ),
        Err(error) => Check::problem(&topic::QEMU, chain(error), install(look)),
    }
}

fn machines(look: &Look, capabilities: &Capabilities) -> Check {
    let newest = [Family::Q35, Family::Pc].map(|family| capabilities.newest.get(&family).map(String::as_str));
    match newest {
        [Some(q35), Some(pc)] => Check::ok(
            &topic::QEMU_MACHINES,
            format!("{} types, the newest {q35} and {pc}", capabilities.machines.len()),
        ),
        [q35, pc] => Check::problem(
            &topic::QEMU_MACHINES,
            format!("q35: {}; pc: {}", q35.unwrap_or("missing"), pc.unwrap_or("missing")),
            install(look),
        ),
    }
}

fn emulated_moves(look: &Look, major: u32, verdict: Option<&Verdict>) -> Check {
    let topic = &topic::QEMU_EMULATED;
    match verdict.map(|verdict| verdict.accelerator) {
        Some(Accelerator::Kvm) => Check::ok(topic, "guests run under KVM, which this does not concern"),
        _ if major >= COPIES_EMULATED_FROM => Check::ok(topic, format!("QEMU {major} copies them while they run")),
        _ => Check::warning(
            topic,
            format!("QEMU {major}: an emulated guest stands for the whole of a move"),
            format!(
                "make KVM usable (see {}), or use QEMU {COPIES_EMULATED_FROM} or newer (Debian 13): {}",
                topic::ACCELERATOR.id,
                install(look)
            ),
        ),
    }
}

fn accelerator(look: &Look, verdict: &Result<Verdict, ProbeError>) -> Check {
    let topic = &topic::ACCELERATOR;
    match verdict {
        Ok(verdict) if verdict.accelerator == Accelerator::Kvm => Check::ok(topic, &verdict.reason),
        Ok(verdict) => Check::warning(topic, &verdict.reason, kvm_mend(look)),
        Err(error @ ProbeError::Disk(_)) => Check::skipped(topic, chain(error)).mend("free some memory"),
        Err(error) => Check::problem(topic, chain(error), install(look)),
    }
}

/// What is next to do for KVM, by how far it is there.
fn kvm_mend(look: &Look) -> String {
    if !look.exists("/dev/kvm") {
        return format!(
            "{}; if that fails, see {}",
            look.command("modprobe -a kvm_intel kvm_amd"),
            topic::CPU.id
        );
    }
    "use a machine, or a VM with nested virtualisation, whose KVM runs guests at speed; this one's is slower than emulation or wrong".to_owned()
}

/// `qemu-img`, which comes in another package than QEMU.
pub(super) fn look_at_qemu_img(look: &Look) -> Checks {
    let topic = &topic::QEMU_IMG;
    let mend = || look.install("qemu-utils", "qemu-img");
    if !look.is_real {
        return vec![match look.program("qemu-img") {
            Some(path) => Check::ok(topic, path.display().to_string()),
            None => Check::problem(topic, "there is no qemu-img", mend()),
        }];
    }
    vec![match process::first_line("qemu-img", &["--version"]) {
        Ok(line) => Check::ok(topic, line),
        Err(why) => Check::problem(topic, why, mend()),
    }]
}

#[cfg(test)]
mod tests {
    use super::super::{State, look::tests::empty};
    use super::*;

    fn verdict(accelerator: Accelerator) -> Result<Verdict, ProbeError> {
        Ok(Verdict {
            accelerator,
            reason: "as seen".to_owned(),
        })
    }

    #[test]
    fn the_accelerator_is_what_the_probe_chose() {
        let look = empty().look();
        assert_eq!(accelerator(&look, &verdict(Accelerator::Kvm)).state, State::Ok);
        let emulated = accelerator(&look, &verdict(Accelerator::Tcg));
        assert_eq!(emulated.state, State::Warning);
        assert!(emulated.why.contains("security boundary") && emulated.why.contains("times slower"));
        assert!(emulated.mend.unwrap().starts_with("modprobe -a kvm_intel"));
        let there = empty().with("/dev/kvm", "");
        assert!(kvm_mend(&there.look()).contains("nested virtualisation"));
        let neither = ProbeError::Neither {
            emulated: "failed".to_owned(),
            kvm: "no /dev/kvm".to_owned(),
        };
        assert_eq!(accelerator(&look, &Err(neither)).state, State::Problem);
    }

    #[test]
    fn an_older_qemu_is_a_warning_only_where_guests_are_emulated() {
        let look = empty().look();
        let (kvm, tcg) = (verdict(Accelerator::Kvm).unwrap(), verdict(Accelerator::Tcg).unwrap());
        assert_eq!(emulated_moves(&look, 7, Some(&kvm)).state, State::Ok);
        assert_eq!(emulated_moves(&look, 9, Some(&tcg)).state, State::Warning);
        assert_eq!(emulated_moves(&look, 10, Some(&tcg)).state, State::Ok);
    }

    #[tokio::test]
    async fn a_qemu_that_is_not_there_is_a_problem_with_the_command_that_installs_it() {
        let look = empty().look();
        let asked = discover(&Program::at("/nonexistent/qemu")).await;
        let check = version(&look, &asked);
        assert_eq!(check.state, State::Problem);
        assert!(check.mend.unwrap().starts_with("apt install qemu-system-x86"));
    }

    #[test]
    fn qemu_img_is_there_or_is_installed() {
        let missing = look_at_qemu_img(&empty().look()).remove(0);
        assert_eq!(missing.mend.as_deref(), Some("apt install qemu-utils"));
        let there = look_at_qemu_img(&empty().with("/usr/bin/qemu-img", "").look()).remove(0);
        assert_eq!(there.state, State::Ok);
    }
}
