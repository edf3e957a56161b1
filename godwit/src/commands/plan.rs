//! A plan for people: the chosen host, and every host with why or why not.

use model::Plan;
use serde_json::Value;

use super::Session;
use crate::{
    exit::{Exit, Failure},
    out,
};

/// Prints a plan. One without a host is a refusal: the exit code says so.
pub(crate) fn show(session: &Session, value: &Value) -> Result<(), Failure> {
    let plan: Plan = out::read(value)?;
    if session.format.is_data() {
        out::data(session.format, value)?;
    } else {
        out::text(&text(&plan))?;
    }
    match plan.host {
        Some(_) => Ok(()),
        None => Err(Failure::new(Exit::Failed, "no host will do").hint("the table says why, host by host")),
    }
}

fn text(plan: &Plan) -> String {
    let chosen = plan.host_name.as_ref().map_or("-".to_owned(), ToString::to_string);
    let rows = plan.hosts.iter().map(|verdict| {
        let word = match (verdict.refused.is_empty(), plan.host == Some(verdict.host)) {
            (true, true) => "chosen",
            (true, false) => "possible",
            (false, _) => "refused",
        };
        vec![
            verdict.name.to_string(),
            word.to_owned(),
            verdict.score.to_string(),
            verdict.refused.join("; "),
        ]
    });
    let table = out::table::rows(&["HOST", "VERDICT", "SCORE", "WHY NOT"], rows);
    format!("host: {chosen}\n\n{table}")
}

#[cfg(test)]
mod tests {
    use model::{HostId, command::HostVerdict};
    use uuid::Uuid;

    use super::*;

    #[test]
    fn every_host_is_listed_with_why_or_why_not() {
        let host = |n: u128, name: &str, refused: &[&str], score| HostVerdict {
            host: HostId(Uuid::from_u128(n)),
            name: name.parse().unwrap(),
            refused: refused.iter().map(|&why| why.to_owned()).collect(),
            score,
        };
        let plan = Plan {
            vm: None,
            host: Some(HostId(Uuid::from_u128(2))),
            host_name: Some("h2".parse().unwrap()),
            hosts: vec![
                host(1, "h1", &["no room\u{1b}[2J", "not schedulable"], 0),
                host(2, "h2", &[], 900),
                host(3, "h3", &[], 10),
            ],
        };
        let expected = "\
host: h2

HOST  VERDICT   SCORE  WHY NOT
h1    refused   0      no room\\u{1b}[2J; not schedulable
h2    chosen    900    -
h3    possible  10     -
";
        assert_eq!(text(&plan), expected);
    }
}
