//! `godwit doctor`: what this machine lacks, and how to mend it.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::agent::PoolFlag;
use crate::{
    cli::Common,
    doctor::{self, Asked, Check, Look, Role, State},
    exit::{Exit, Failure},
    out::{self, Format, safe, table},
    shutdown,
};

/// Say what this machine lacks, and how to mend it; changes nothing.
#[derive(Args, Debug)]
pub(crate) struct Doctor {
    /// What the machine is, or is to be; may be given several times. Without it, what is there tells, and on a machine with nothing, all
    #[arg(long = "for", value_enum, value_name = "ROLE")]
    roles: Vec<Role>,
    /// A storage pool's directory, as the agent is told; may be given several times
    #[arg(long = "pool", value_name = "NAME=DIR")]
    pools: Vec<PoolFlag>,
    /// The bridge of VMs
    #[arg(long, default_value = "godwit0", value_name = "NAME")]
    bridge: network::InterfaceName,
    /// The interface by which the bridge reaches other hosts
    #[arg(long, value_name = "INTERFACE")]
    uplink: Option<network::InterfaceName>,
    /// Largest packet on the bridge, bytes
    #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u32).range(576..=65_535), value_name = "BYTES")]
    mtu: u32,
    /// QEMU: a program, or a directory with an unpacked one
    #[arg(long, default_value = "qemu-system-x86_64", value_name = "PATH")]
    qemu: PathBuf,
    /// The ports on which a controller listens here
    #[arg(long = "port", default_values_t = [7443, 7444], value_parser = clap::value_parser!(u16).range(1..), value_name = "PORT")]
    ports: Vec<u16>,
}

impl Doctor {
    fn asked(&self, common: &Common) -> Result<Asked, Failure> {
        let state = common.state.as_ref().map(std::path::absolute).transpose();
        Ok(Asked {
            roles: self.roles.clone(),
            state: state.map_err(|error| Failure::of(Exit::Usage, &error))?,
            pools: self.pools.iter().map(|pool| pool.directory().to_owned()).collect(),
            bridge: self.bridge.to_string(),
            uplink: self.uplink.as_ref().map(ToString::to_string),
            mtu: self.mtu,
            qemu: self.qemu.clone(),
            ports: self.ports.clone(),
            server: common.flags(),
        })
    }

    pub(crate) async fn run(&self, common: &Common) -> Result<(), Failure> {
        let asked = shutdown::asked_for()?;
        let look = Look::here(self.asked(common)?);
        let roles = look.roles.clone();
        let checks = tokio::select! {
            checks = doctor::examine(look) => checks,
            // What was started ends with the future.
            () = asked => return Err(Failure::new(Exit::Interrupted, "interrupted")),
        };
        print(common.output, &roles, &checks)?;
        let problems: Vec<_> = doctor::in_state(&checks, State::Problem).map(name).collect();
        if problems.is_empty() {
            return Ok(());
        }
        let message = match problems.as_slice() {
            [one] => format!("one problem on this machine: {one}"),
            many => format!("{} problems on this machine: {}", many.len(), many.join(", ")),
        };
        Err(Failure::new(Exit::Unwell, message).hint("mend them as it is said with each, then: godwit doctor"))
    }
}

/// A check's id, and what it is about.
fn name(check: &Check) -> String {
    match &check.about {
        Some(about) => format!("{} ({about})", check.id),
        None => check.id.to_owned(),
    }
}

fn print(format: Format, roles: &[Role], checks: &[Check]) -> Result<(), Failure> {
    if format.is_data() {
        let count = |state| doctor::in_state(checks, state).count();
        return out::data(
            format,
            &json!({
                "version": env!("CARGO_PKG_VERSION"),
                "for": roles,
                "summary": {
                    "ok": count(State::Ok),
                    "warning": count(State::Warning),
                    "problem": count(State::Problem),
                    "skipped": count(State::Skipped),
                },
                "checks": checks,
            }),
        );
    }
    out::text(&rendered(format == Format::Wide, roles, checks))
}

fn rendered(wide: bool, roles: &[Role], checks: &[Check]) -> String {
    let row = |check: &Check| {
        let mut row = vec![check.state.word().to_owned(), name(check), check.seen.clone()];
        if wide {
            row.extend([check.mend.clone().unwrap_or_default(), check.why.to_owned()]);
        }
        row
    };
    let heading: &[&str] = match wide {
        true => &["STATE", "CHECK", "SEEN", "MEND", "WHY"],
        false => &["STATE", "CHECK", "SEEN"],
    };
    let mut text = table::rows(heading, checks.iter().map(row));
    if !wide {
        for state in [State::Problem, State::Warning, State::Skipped] {
            for check in doctor::in_state(checks, state) {
                let (name, seen) = (safe::text(&name(check)), safe::text(&check.seen));
                text += &format!("\n{}: {name}: {seen}\n  why:  {}\n", state.word(), check.why);
                if let Some(mend) = &check.mend {
                    text += &format!("  mend: {}\n", safe::text(mend));
                }
            }
        }
    }
    let words: Vec<_> = roles.iter().map(|role| role.word()).collect();
    let counts = [State::Ok, State::Warning, State::Problem, State::Skipped]
        .map(|state| format!("{} {}", doctor::in_state(checks, state).count(), state.word()));
    text + &format!("\nas {}: {}\n", words.join(", "), counts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(state: State, mend: Option<&str>) -> Check {
        Check {
            id: "cpu",
            about: None,
            state,
            seen: "a \u{1b}[31m CPU".to_owned(),
            why: "guests need one",
            mend: mend.map(str::to_owned),
        }
    }

    #[test]
    fn what_is_not_well_is_shown_with_why_and_mend_and_no_escape() {
        let checks = [check(State::Ok, None), check(State::Problem, Some("buy one"))];
        let text = rendered(false, &[Role::Agent], &checks);
        assert!(
            text.starts_with("STATE    CHECK  SEEN\nok       cpu    a \\u{1b}[31m CPU\n"),
            "{text}"
        );
        assert!(
            text.contains("\nproblem: cpu: a \\u{1b}[31m CPU\n  why:  guests need one\n  mend: buy one\n"),
            "{text}"
        );
        assert!(
            text.ends_with("\nas agent: 1 ok, 0 warning, 1 problem, 0 skipped\n"),
            "{text}"
        );
        let wide = rendered(true, &[Role::Agent], &checks);
        assert!(wide.contains("buy one") && !wide.contains("mend:"), "{wide}");
    }
}
