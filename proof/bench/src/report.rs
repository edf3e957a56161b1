//! The samples of all arms as a table for people and as JSON for machines.

use crate::measure::Sample;
use crate::stats::{Ratio, median, ratio, worst};
use serde_json::{Map, Value, json};
use std::fmt::Write as _;

/// The samples of one case, by arm, in the order of the rounds.
#[derive(Clone, Debug)]
pub struct Case {
    /// As in `calm-512M`.
    pub name: String,
    /// Arm and its samples; sample k of every arm is of round k.
    pub arms: Vec<(&'static str, Vec<Sample>)>,
}

/// Where it was measured.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Commit of this tree.
    pub commit: String,
    /// Processors.
    pub cores: usize,
    /// `tcg` or `kvm`.
    pub accel: &'static str,
    /// QEMU's version.
    pub qemu: String,
}

/// The arm that the others are compared with: Godwit, or the first one when it is not in the run.
fn subject(case: &Case) -> Option<&(&'static str, Vec<Sample>)> {
    case.arms
        .iter()
        .find(|(name, _)| *name == "godwit")
        .or(case.arms.first())
}

/// One metric of an arm's samples; empty when the arm does not tell it.
fn values(samples: &[Sample], index: usize) -> Vec<f64> {
    samples
        .iter()
        .map(|sample| sample.metrics()[index].1)
        .filter(|value| value.is_finite())
        .collect()
}

fn metric_names(case: &Case) -> Vec<&'static str> {
    let first = case.arms.iter().find_map(|(_, samples)| samples.first());
    first
        .map(|sample| sample.metrics().map(|(name, _)| name).to_vec())
        .unwrap_or_default()
}

fn ratio_of(ours: &[Sample], theirs: &[Sample], index: usize) -> Option<Ratio> {
    let all = |samples: &[Sample]| -> Vec<f64> { samples.iter().map(|sample| sample.metrics()[index].1).collect() };
    let ratio = ratio(&all(ours), &all(theirs));
    (ratio.pairs > 0).then_some(ratio)
}

/// The JSON of performance tables: arms with n, median and worst; ratios of the
/// subject to each other arm, and their 95 % intervals.
pub fn json(machine: &Machine, cases: &[Case]) -> Value {
    let mut rows = Vec::new();
    for case in cases {
        for (index, metric) in metric_names(case).into_iter().enumerate() {
            rows.push(row(case, index, metric));
        }
    }
    json!({
        "bench": "migrate",
        "commit": machine.commit,
        "machine": { "cores": machine.cores, "accel": machine.accel, "qemu": machine.qemu },
        "rows": rows,
    })
}

fn row(case: &Case, index: usize, metric: &str) -> Value {
    let (mut arms, mut ratios, mut intervals) = (Map::new(), Map::new(), Map::new());
    let ours = subject(case);
    for (name, samples) in &case.arms {
        let found = values(samples, index);
        if found.is_empty() {
            continue;
        }
        let summary = json!({ "n": found.len(), "median": round(median(&found)), "worst": round(worst(&found)) });
        arms.insert((*name).to_owned(), summary);
        if let Some((_, samples_of_ours)) = ours.filter(|(subject, _)| subject != name)
            && let Some(ratio) = ratio_of(samples_of_ours, samples, index)
        {
            ratios.insert((*name).to_owned(), json!(round(ratio.median)));
            intervals.insert((*name).to_owned(), json!([round(ratio.low), round(ratio.high)]));
        }
    }
    json!({
        "case": case.name, "metric": metric, "better": "lower", "arms": arms,
        "ratios": ratios, "intervals_95": intervals,
    })
}

fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// The table for people.
pub fn table(machine: &Machine, cases: &[Case]) -> String {
    let mut out = String::new();
    for case in cases {
        let (cores, accel, qemu) = (machine.cores, machine.accel, &machine.qemu);
        let _ = writeln!(
            out,
            "{}   {cores} cores, {accel}, QEMU {qemu}, commit {}\n",
            case.name, machine.commit
        );
        let ours = subject(case);
        let against = ours.map_or("", |(name, _)| name);
        for (index, metric) in metric_names(case).into_iter().enumerate() {
            let _ = writeln!(
                out,
                "{metric:<24}{:>4}{:>12}{:>12}   {against} / arm (95 % of the median)",
                "n", "median", "worst"
            );
            for (name, samples) in &case.arms {
                let found = values(samples, index);
                if found.is_empty() {
                    continue;
                }
                let ratio = ours
                    .filter(|(subject, _)| subject != name)
                    .and_then(|(_, ours)| ratio_of(ours, samples, index))
                    .map(|r| format!("{:>7.2}  ({:.2} .. {:.2})", r.median, r.low, r.high));
                let (n, median, worst) = (found.len(), median(&found), worst(&found));
                let line = format!(
                    "  {name:<22}{n:>4}{median:>12.1}{worst:>12.1}   {}",
                    ratio.unwrap_or_default()
                );
                let _ = writeln!(out, "{}", line.trim_end());
            }
            out.push('\n');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(blackout_ms: f64) -> Sample {
        Sample {
            blackout_ms,
            baseline_gap_ms: 2.0,
            qemu_downtime_ms: f64::NAN,
            request_to_running_ms: 100.0,
            request_to_answer_ms: 110.0,
            total_ms: 120.0,
            bytes: 5e7,
        }
    }

    fn case() -> Case {
        Case {
            name: "calm-512M".into(),
            arms: vec![
                ("qemu-tuned", vec![sample(10.0), sample(20.0), sample(40.0)]),
                ("godwit", vec![sample(11.0), sample(22.0), sample(44.0)]),
            ],
        }
    }

    fn machine() -> Machine {
        Machine {
            commit: "abc".into(),
            cores: 2,
            accel: "tcg",
            qemu: "10.0.2".into(),
        }
    }

    #[test]
    fn the_json_has_the_agreed_form() {
        let json = json(&machine(), &[case()]);
        assert_eq!(json["bench"], "migrate");
        assert_eq!(json["machine"]["accel"], "tcg");
        let row = &json["rows"][0];
        assert_eq!(
            (row["case"].as_str(), row["metric"].as_str()),
            (Some("calm-512M"), Some("blackout_ms"))
        );
        assert_eq!(row["arms"]["godwit"], json!({ "n": 3, "median": 22.0, "worst": 44.0 }));
        assert_eq!(row["ratios"], json!({ "qemu-tuned": 1.1 }));
    }

    #[test]
    fn what_an_arm_does_not_tell_is_left_out_not_zero() {
        let json = json(&machine(), &[case()]);
        let downtime = json["rows"]
            .as_array()
            .unwrap()
            .iter()
            .find(|row| row["metric"] == "qemu_downtime_ms")
            .unwrap();
        assert_eq!(downtime["arms"], json!({}));
        assert!(table(&machine(), &[case()]).contains("godwit"));
    }
}
