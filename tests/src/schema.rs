//! `docs/events.schema.json`, and lines of JSON held against it.
//!
//! The schema allows other programs more than it allows tcptrace: for them, fields and kinds of lines that
//! it does not know are those of a newer tcptrace. Here, a line may have nothing that it does not describe.

use std::sync::LazyLock;

use jsonschema::Validator;
use serde_json::{Value, json};

const SCHEMA: &str = include_str!("../../docs/events.schema.json");

static WRITTEN: LazyLock<Value> =
    LazyLock::new(|| serde_json::from_str(SCHEMA).expect("the schema is JSON"));

static STRICT: LazyLock<Validator> = LazyLock::new(|| {
    let mut schema = WRITTEN.clone();
    schema["properties"]["event"]["enum"] = json!(kinds());
    close(&mut schema["$defs"]);
    jsonschema::validator_for(&schema).expect("docs/events.schema.json is a JSON Schema")
});

/// The kinds of lines that are described, in their order.
///
/// # Panics
/// When the schema is not of the form it has.
#[must_use]
pub fn kinds() -> Vec<&'static str> {
    let conditions = WRITTEN["allOf"].as_array().expect("a condition a kind");
    let kind = |condition: &'static Value| {
        let kind = condition["if"]["properties"]["event"]["const"].as_str();
        let kind = kind.expect("a kind");
        let definition = condition["then"]["$ref"].as_str();
        assert_eq!(definition, Some(format!("#/$defs/{kind}").as_str()));
        kind
    };
    conditions.iter().map(kind).collect()
}

/// The values that a definition allows: `state`, `via`, `ending`, `cause`.
///
/// # Panics
/// When there is no such definition.
#[must_use]
pub fn values(definition: &str) -> Vec<&'static str> {
    let values = WRITTEN["$defs"][definition]["enum"].as_array();
    let values = values.unwrap_or_else(|| panic!("no values of {definition}"));
    values.iter().filter_map(Value::as_str).collect()
}

/// Every object that is described has these properties and no others.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(members) => {
            members.values_mut().for_each(close);
            if members.get("properties").is_some_and(Value::is_object) {
                members.insert("additionalProperties".to_owned(), Value::Bool(false));
            }
        }
        Value::Array(items) => items.iter_mut().for_each(close),
        _ => {}
    }
}

/// What is wrong with a line, and what to do about it; `None` if all of it is described.
#[must_use]
pub fn violation(line: &Value) -> Option<String> {
    let wrong: Vec<String> = STRICT
        .iter_errors(line)
        .map(|error| format!("  {error} (at {:?})", error.instance_path().to_string()))
        .collect();
    (!wrong.is_empty()).then(|| {
        format!(
            "docs/events.schema.json does not describe this line:\n{}\n  {line}\n\
             If the line is right, describe what is new there, and in docs/events.md.",
            wrong.join("\n")
        )
    })
}

/// Every line of this output is described.
///
/// # Panics
/// When one is not, or is not JSON.
#[track_caller]
pub fn assert_described(output: &str) {
    for line in output.lines() {
        let value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        if let Some(violation) = violation(&value) {
            panic!("{violation}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    const PAGE: &str = include_str!("../../docs/events.md");

    fn line(kind: &str) -> Value {
        let examples = examples();
        let of_kind = examples.into_iter().find(|line| line["event"] == kind);
        of_kind.unwrap_or_else(|| panic!("docs/events.md has no example of `{kind}`"))
    }

    /// The lines of JSON in docs/events.md.
    fn examples() -> Vec<Value> {
        let mut lines = Vec::new();
        let mut inside = false;
        for line in PAGE.lines() {
            if line.starts_with("```") {
                inside = line == "```json";
            } else if inside {
                lines.push(serde_json::from_str(line).unwrap_or_else(|error| {
                    panic!("an example of docs/events.md is not JSON: {error}: {line}")
                }));
            }
        }
        lines
    }

    #[test]
    fn the_page_has_an_example_of_each_kind_and_they_are_right() {
        for kind in kinds() {
            let _ = line(kind);
        }
        for example in examples() {
            assert_eq!(violation(&example), None);
        }
    }

    #[test]
    fn what_is_not_described_is_found() {
        for (path, new, said) in [
            ("/surprise", json!(1), "surprise"),
            ("/owner/surprise", json!(1), "surprise"),
            ("/to", json!("CLOSED"), "CLOSED"),
            ("/after_seconds", json!("1.0"), "1.0"),
            ("/time", json!("2026-11-20T19:47:03.2Z"), "19:47:03.2Z"),
            ("/event", json!("surprise"), "surprise"),
            ("/late", json!(false), "late"),
        ] {
            let mut line = line("transition");
            let (parent, name) = path.rsplit_once('/').expect("a path");
            line.pointer_mut(parent).expect("an object")[name] = new;
            let said_is = violation(&line).unwrap_or_else(|| panic!("{path} is not found"));
            assert!(said_is.contains(said), "{path}: {said_is}");
        }
        let mut short = line("transition");
        short.as_object_mut().expect("an object").remove("error");
        let said = violation(&short).expect("it lacks a field");
        assert!(said.contains("error"), "{said}");
    }

    /// Other programs may go on using the schema when a newer tcptrace tells more.
    #[test]
    fn others_may_meet_what_is_new() {
        let validator = jsonschema::validator_for(&WRITTEN).expect("a schema");
        for kind in kinds() {
            let mut line = line(kind);
            line["surprise"] = json!(1);
            assert!(validator.is_valid(&line), "{line}");
        }
        assert!(validator.is_valid(&json!({"event": "surprise"})));
        assert!(!validator.is_valid(&json!({"event": "lost"})), "no time");
        assert!(!validator.is_valid(&json!({})));
    }

    /// The names of the fields in `schema`, with its definition's where it refers to one, and where they are.
    fn fields(schema: &'static Value, at: &str, found: &mut BTreeMap<String, &'static Value>) {
        if let Some(name) = schema["$ref"].as_str() {
            let definition = name.strip_prefix("#/$defs/").expect("one of this file");
            fields(&WRITTEN["$defs"][definition], at, found);
        }
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            let path = format!("{at}.{name}");
            fields(property, &path, found);
            found.insert(path, property);
        }
        for inner in schema["anyOf"].as_array().into_iter().flatten() {
            fields(inner, at, found);
        }
        if schema["items"].is_object() {
            fields(&schema["items"], at, found);
        }
    }

    /// The values that are allowed at a field.
    fn allowed(schema: &'static Value) -> Vec<&'static str> {
        let mut values: Vec<&str> = Vec::new();
        if let Some(name) = schema["$ref"].as_str() {
            values.extend(allowed(&WRITTEN["$defs"][&name["#/$defs/".len()..]]));
        }
        let own = schema["enum"].as_array().into_iter().flatten();
        values.extend(own.filter_map(Value::as_str));
        for inner in schema["anyOf"].as_array().into_iter().flatten() {
            values.extend(allowed(inner));
        }
        if schema["propertyNames"].is_object() {
            values.extend(allowed(&schema["propertyNames"]));
        }
        values
    }

    /// The part of the page that is about a kind of line, with what it says of all.
    fn about(kind: &str) -> String {
        let (page, _) = PAGE.split_once("\n## Recordings").expect("the recordings");
        let mut parts = page.split("\n### ");
        let general = parts.next().expect("a beginning");
        let own: Vec<&str> = parts
            .filter(|part| {
                let heading = part.lines().next().unwrap_or_default();
                heading.contains(&format!("`{kind}`"))
            })
            .collect();
        assert_eq!(own.len(), 1, "docs/events.md: one section about `{kind}`");
        format!("{general}\n{}", own[0])
    }

    /// What stands in backticks, outside of the examples; of JSON in them, its words.
    fn named(text: &str) -> BTreeSet<&str> {
        let outside = text.split("```").step_by(2);
        let quoted = outside.flat_map(|text| text.split('`').skip(1).step_by(2));
        quoted
            .flat_map(|quoted| {
                let words = quoted.split(|char: char| !is_word(char));
                words.chain([quoted])
            })
            .collect()
    }

    fn is_word(char: char) -> bool {
        char.is_ascii_alphanumeric() || char == '_'
    }

    #[test]
    fn every_field_has_a_description_and_is_on_the_page() {
        let anywhere = named(PAGE);
        for kind in kinds() {
            let definition = &WRITTEN["$defs"][kind];
            let text = about(kind);
            let named = named(&text);
            let mut found = BTreeMap::new();
            fields(definition, kind, &mut found);
            assert!(found.len() > 2, "{kind}: {found:?}");
            for (path, property) in found {
                let referred = property["$ref"].as_str().map(|name| {
                    let definition = &WRITTEN["$defs"][&name["#/$defs/".len()..]];
                    &definition["description"]
                });
                let description = [Some(&property["description"]), referred];
                let described = description.into_iter().flatten().any(Value::is_string);
                assert!(
                    described,
                    "docs/events.schema.json: {path} has no description"
                );
                let name = path.rsplit('.').next().unwrap_or_default();
                assert!(
                    named.contains(name),
                    "docs/events.md does not name `{name}` ({path}) where it is about `{kind}`"
                );
                for value in allowed(property) {
                    assert!(
                        anywhere.contains(value),
                        "docs/events.md does not name `{value}`, which {path} can be"
                    );
                }
            }
        }
    }

    /// What the page's tables say is a field, is one.
    #[test]
    fn the_page_names_no_field_that_is_not_there() {
        let mut rows = 0;
        for kind in kinds() {
            let mut found = BTreeMap::new();
            fields(&WRITTEN["$defs"][kind], kind, &mut found);
            let text = about(kind);
            let tables = text.split("| field | meaning |").skip(1);
            let lines = tables.flat_map(|table| table.lines().skip(2).take_while(is_row));
            for cell in lines.filter_map(|line| line.split('|').nth(1)) {
                for name in cell.split('`').skip(1).step_by(2) {
                    rows += 1;
                    assert!(
                        found.contains_key(&format!("{kind}.{name}")),
                        "docs/events.md: `{kind}` has no field `{name}`"
                    );
                }
            }
        }
        assert!(rows > 40, "only {rows} fields were found");
    }

    fn is_row(line: &&str) -> bool {
        line.starts_with('|')
    }
}
