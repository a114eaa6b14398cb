// A lit surface. GROUP 0: skin; 1: eyes, teeth, tongue; 2: lashes and hair. Each group is a program of its own, because
// software rendering executes both sides of every branch.
in vec3 point, outward, place;
in vec2 texel;
flat in int kind;
out vec4 colour;
uniform sampler2D source;  // the texture from paint.fragment.glsl
uniform vec3 eye, hair, iris, sky, ground;
uniform vec3 lights[6];    // direction and colour of each
uniform vec4 strands;      // density, -, parting, swirl

struct Surface {
    vec3 colour;
    vec3 bleed;   // colour of subsurface scattering
    float gloss;  // sharpness of reflections, 0 to 1
    float shine;  // strength of reflections
    float wrap;   // wrap of diffuse light into the shade
    float alpha;
    float dim;    // share of the light that arrives
};

Surface skin_surface() {
    vec4 painted = texture(source, texel);
    bool cloth = painted.a < .06;
    return Surface(painted.rgb * painted.rgb, cloth ? vec3(0) : vec3(.55, .16, .09), painted.a, cloth ? .03 : .25,
        cloth ? .1 : .35, 1., 1.);
}

Surface eye_surface() {
    vec3 d = normalize(place);
    float q = acos(clamp(d.z, -1., 1.)), angle = atan(d.y, d.x);
    vec3 c = iris * (.7 + .5 * noise(vec3(angle * 6., q * 8., 2.))) * (.6 + .8 * smoothstep(.15, .48, q));
    c = mix(c, iris * .25, smoothstep(.42, .52, q));
    c = mix(c, vec3(.84, .81, .78) * (1. - .15 * smoothstep(.5, 1.2, q)), smoothstep(.48, .55, q));
    c = mix(vec3(.012), c, smoothstep(.17, .24, q));
    c *= mix(1., .45, smoothstep(.15, .55, d.y));  // the upper lid's shadow
    return Surface(c, vec3(.05, .02, .01), 1., .6, .2, 1., 1.);
}

Surface teeth_surface() {
    float gap = abs(fract(atan(place.x, place.z - .75) * 7.2) - .5) * 2.;
    vec3 c = vec3(.80, .76, .69) * mix(.75, 1., smoothstep(0., .25, 1. - gap));
    float dim = (.12 + .73 * smoothstep(1.05, 1.42, place.z)) * (1. - .7 * smoothstep(.12, .25, abs(place.x)));
    return Surface(c, vec3(.08), .6, .2, .35, 1., dim);
}

Surface tongue_surface() {
    return Surface(vec3(.50, .20, .20), vec3(.55, .16, .09), .5, .25, .35, 1., .2 + .5 * smoothstep(.9, 1.38, place.z));
}

Surface lash_surface() {
    return Surface(vec3(.025, .018, .015), vec3(0), 0., 0., .35, place.y > 7.26 ? .62 : .22, 1.);
}

Surface hair_surface(vec3 normal, vec3 view) {
    float around = atan(place.x - strands.z, place.z - .15) + strands.w * (place.y - 7.5);
    float strand = noise(vec3(around * strands.x, place.y * 1.6, 1.)) * .6
        + noise(vec3(around * strands.x * 2.6, place.y * 2.5, 7.)) * .4;
    float height = above_hairline(place) + .16 * (strand - .5);
    // The curtain's texels count down from -1 at its top to -2 at its lower edge.
    float alpha = texel.x < 0. ? smoothstep(0., .08, texel.y + 2. + .12 * (strand - .5)) : smoothstep(-.03, .07, height);
    if (alpha < .02) discard;
    vec3 c = hair * (.5 + .9 * strand) * mix(.7, 1., smoothstep(0., .25, height));
    vec3 along = normalize(vec3(0, 1, 0) - normal * normal.y);
    float q = dot(along, normalize(normalize(lights[0]) + view)) + .12 * (strand - .5);
    c += hair * 1.3 * pow(sqrt(max(0., 1. - q * q)), 60.) * strand;
    return Surface(c, vec3(0), .35, 0., .15, alpha, 1.);
}

vec3 lit(Surface s, vec3 normal, vec3 view) {
    vec3 sum = vec3(0);
    float grey = s.bleed == vec3(0) ? 0. : .25;
    for (int i = 0; i < 3; i++) {
        vec3 light = normalize(lights[2 * i]), halfway = normalize(light + view);
        float facing = dot(normal, light), direct = max(0., facing);
        float wrapped = max(0., (facing + s.wrap) / (1. + s.wrap));
        wrapped *= wrapped * .35 + .65;
        vec3 diffuse = vec3(direct) + (wrapped - direct) * (s.bleed * 1.3 + grey);
        float sharp = mix(8., 160., s.gloss * s.gloss);
        float gleam = pow(max(0., dot(normal, halfway)), sharp) * (sharp + 8.) / 25. * s.shine * .25;
        float fresnel = .04 + .96 * pow(1. - max(0., dot(halfway, view)), 5.);
        sum += lights[2 * i + 1] * (s.colour * diffuse + gleam * fresnel * 8. * step(0., facing));
    }
    sum += s.colour * mix(ground, sky, normal.y * .5 + .5) * mix(.45, 1., smoothstep(-.9, .4, normal.y + .55));
    return sum + s.colour * pow(1. - max(0., dot(normal, view)), 3.5) * .25;
}

void main() {
    vec3 normal = normalize(outward), view = normalize(eye - point);
#if GROUP == 0
    Surface s = skin_surface();
    float chin = length((place.xy - vec2(0., 6.)) / vec2(1.1, .55)) - .25 + step(.95, place.z);
    s.dim = mix(.62, 1., smoothstep(0., .5, chin));  // shade under the chin
#else
    if (dot(normal, view) < 0.) normal = -normal;
#if GROUP == 1
    Surface s = kind == 1 ? eye_surface() : kind == 2 ? teeth_surface() : tongue_surface();
#else
    Surface s = kind == 4 ? lash_surface() : hair_surface(normal, view);
#endif
#endif
    vec3 sum = lit(s, normal, view) * s.dim;
    sum /= sum * .22 + .82;  // bright parts saturate softly
    colour = vec4(pow(clamp(sum, 0., 1.), vec3(1. / 2.2)), s.alpha);
}
