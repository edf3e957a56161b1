//! Whether something keeps the clock in step.

use super::{Check, Checks, Look, Topic, sys, sys::KernelClock, topic};

pub(super) const TOPICS: &[&Topic] = &[&topic::CLOCK];

/// Programs that keep clocks in step, by the name of their process.
const KEEPERS: [&str; 5] = ["chronyd", "ntpd", "systemd-timesyn", "openntpd", "ptp4l"];
/// More than this, and nobody kept it for days.
const ERROR_MAX_US: i64 = 1_000_000;

pub(super) fn look(look: &Look) -> Checks {
    vec![match sys::kernel_clock() {
        Ok(clock) => judge(look, clock),
        Err(error) => Check::skipped(&topic::CLOCK, format!("the kernel does not tell: {error}"))
            .mend("run outside of the container"),
    }]
}

fn judge(look: &Look, clock: KernelClock) -> Check {
    let topic = &topic::CLOCK;
    let keeper = super::ports::processes(look)
        .into_iter()
        .map(|(_, name)| name)
        .find(|name| KEEPERS.contains(&name.as_str()));
    if clock.is_synchronised && clock.error_max_us < ERROR_MAX_US {
        let by = keeper.map(|name| format!(" by {name}")).unwrap_or_default();
        let error = clock.error_max_us / 1000;
        return Check::ok(topic, format!("kept in step{by}, wrong by at most {error} ms"));
    }
    match keeper {
        Some(name) => Check::warning(
            topic,
            format!("not in step yet; {name} runs"),
            "see whether it reaches its servers: chronyc sources, or timedatectl timesync-status",
        ),
        None => Check::warning(
            topic,
            "nothing keeps it in step",
            format!(
                "{}; or timedatectl set-ntp true",
                look.install("chrony", "chrony or another NTP client")
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{State, look::tests::empty};
    use super::*;

    #[test]
    fn a_clock_is_kept_or_somebody_is_named_who_should() {
        let clock = |is_synchronised, error_max_us| KernelClock {
            is_synchronised,
            error_max_us,
        };
        let bare = empty().look();
        assert_eq!(
            judge(&bare, clock(true, 2500)).seen,
            "kept in step, wrong by at most 2 ms"
        );
        let with_chrony = empty().with("/proc/77/comm", "chronyd\n");
        let kept = with_chrony.look();
        assert!(judge(&kept, clock(true, 0)).seen.contains("by chronyd"));
        assert!(judge(&kept, clock(false, 0)).mend.unwrap().contains("chronyc sources"));
        let alone = judge(&bare, clock(false, 16_000_000));
        assert_eq!(alone.state, State::Warning);
        assert!(alone.mend.unwrap().starts_with("apt install chrony"));
        assert_eq!(judge(&bare, clock(true, 16_000_000)).state, State::Warning);
    }

    #[test]
    fn this_kernel_tells_of_its_clock() {
        sys::kernel_clock().unwrap();
    }
}
