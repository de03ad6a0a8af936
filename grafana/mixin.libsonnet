// A monitoring mixin: `jsonnet -J vendor` or mixtool render it, and other mixins add to it.
local groups = std.parseYaml(importstr 'prometheus/koopmon.rules.yml').groups;
local only(kind) = [
  group { rules: [rule for rule in group.rules if kind in rule] }
  for group in groups
  if std.length([rule for rule in group.rules if kind in rule]) > 0
];
{
  grafanaDashboards+:: {
    'koopmon-fleet.json': import 'dashboards/koopmon-fleet.json',
    'koopmon-run.json': import 'dashboards/koopmon-run.json',
    'koopmon-monitor.json': import 'dashboards/koopmon-monitor.json',
  },
  prometheusAlerts+:: { groups+: only('alert') },
  prometheusRules+:: { groups+: only('record') },
}
